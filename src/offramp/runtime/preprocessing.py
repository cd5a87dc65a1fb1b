"""The way from pictures or texts to a network's inputs, as run folders and bundles keep it.

Records only, light to import; ``offramp.data.preprocessing`` does what they say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from offramp.decoding import parse_json
from offramp.errors import ArtifactError, DataNotFoundError, InvalidArgumentError, reason

Resize = Literal["stretch", "shorter_side", "middle_square", "ink_square"]
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""In the order of their numbers in Pillow, which image processors use."""

TOKENIZER_FILE = "tokenizer.json"
"""The tokenizer's file in a run folder or a bundle."""

_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""timm's defaults."""
_MOST_PIXELS_A_SIDE = 2**13
_MOST_TOKENS = 2**17

Side = Annotated[int, Meta(ge=1, le=_MOST_PIXELS_A_SIDE)]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The way from a picture to an input: resized, cut, scaled and normalised.

    The input is ``(pixel / 255 * white - mean) / deviation``, channels first.

    Attributes:
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        channels: 1 for grey, 3 for colours.
        resize: "stretch" to the size whatever the picture's shape; "shorter_side": keep the shape,
            and cut the centre; "middle_square": cut the middle square, then stretch; "ink_square":
            cut to the strokes, in a square, then stretch.
        resize_to: Side in pixels before the centre of height x width is cut: of both sides for
            stretch, of the shorter for shorter_side; None where it is height and width.
        interpolation: nearest, lanczos, bilinear, bicubic, box or hamming, as Pillow has them.
        mean: Subtracted; one number, or one for each channel.
        deviation: Divides what is left; as ``mean``.
        white: What the whitest pixel is before ``mean`` is subtracted: 1, or 255 for networks that
            take pixels as they are.
        light_on_dark: Whether pictures with a light ground are inverted.
        ink_margin: For ink_square: blank border around the strokes, as a share of the side.
        transposed: Whether height and width are swapped at the end.
    Example:
        >>> Preprocessing(height=32, width=32, mean=0.5, deviation=0.25).mean
        (0.5, 0.5, 0.5)
    """

    height: Side
    width: Side
    channels: Literal[1, 3] = 3
    resize: Resize = "stretch"
    resize_to: Side | None = None
    interpolation: Interpolation = "bilinear"
    mean: float | tuple[float, ...] = 0.0
    deviation: float | tuple[float, ...] = 1.0
    white: Annotated[float, Meta(gt=0, le=65535)] = 1.0
    light_on_dark: bool = False
    ink_margin: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0
    transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "resize_to"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, int) and 1 <= value <= _MOST_PIXELS_A_SIDE
            ):
                _refuse(name, f"an int in [1, {_MOST_PIXELS_A_SIDE}]", value)
        if self.channels not in (1, 3):
            _refuse("channels", "1 or 3", self.channels)
        for name, kinds in (("resize", Resize), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(kinds):
                _refuse(name, f"one of {', '.join(get_args(kinds))}", getattr(self, name))
        if not 0 < self.white <= 65535:
            _refuse("white", "in (0, 65535]", self.white)
        if not 0 <= self.ink_margin < 0.5:
            _refuse("ink_margin", "in [0, 0.5)", self.ink_margin)
        for name in ("mean", "deviation"):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name), self.channels))
        if not all(0 < value < 1e9 for value in self.deviations):
            _refuse("deviation", "above 0", self.deviation)
        if self.resize_to is None:
            return
        if self.resize not in ("stretch", "shorter_side"):
            raise InvalidArgumentError(
                "The 'resize_to' parameter is for resize stretch or shorter_side. "
                f"Got {self.resize_to} with {self.resize}."
            )

    @property
    def means(self) -> tuple[float, ...]:
        """The mean of each channel."""
        assert isinstance(self.mean, tuple)
        return self.mean

    @property
    def deviations(self) -> tuple[float, ...]:
        """The deviation of each channel."""
        assert isinstance(self.deviation, tuple)
        return self.deviation

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an input."""
        sides = (self.width, self.height) if self.transposed else (self.height, self.width)
        return (self.channels, *sides)

    @classmethod
    def from_timm(cls, model: object) -> Preprocessing:
        """Read how a timm model was evaluated.

        Args:
            model: The model, its ``default_cfg``, or the dict that ``resolve_data_config`` made.
        Returns:
            The preprocessing of timm's evaluation: resized by ``crop_pct``, the centre cut.
        Raises:
            InvalidArgumentError: If it says nothing of its inputs, or is for another form of them.
        """
        found = model
        for name in ("pretrained_cfg", "default_cfg"):
            found = getattr(found, name, found)
        get = _reader(found, "input_size", "a timm model, its default_cfg or a resolved config")
        channels, height, width = get("input_size")
        mode, share = get("crop_mode") or "center", get("crop_pct") or 0.875
        if mode not in ("center", "squash"):
            _refuse("crop_mode", "center or squash", mode)
        resize_to = None
        if share != 1 or mode == "center":
            if height != width:
                raise InvalidArgumentError(
                    "Expected inputs as high as they are wide, of which the centre is cut. Got "
                    f"{height}x{width}: give Preprocessing(height=..., width=..., ...)."
                )
            resize_to = int(height // share) if share != 1 else height
        return cls(
            height=height,
            width=width,
            channels=channels,
            resize="stretch" if mode == "squash" else "shorter_side",
            resize_to=resize_to,
            interpolation=get("interpolation") or "bicubic",
            mean=_numbers(get("mean"), _IMAGENET_MEAN),
            deviation=_numbers(get("std"), _IMAGENET_DEVIATION),
        )

    @classmethod
    def from_processor(cls, processor: object) -> Preprocessing:
        """Read how an image processor of transformers prepares pictures.

        Args:
            processor: The image processor, one that holds it (as CLIP's), or the dict of its
                ``preprocessor_config.json``.
        Returns:
            The same preprocessing.
        Raises:
            InvalidArgumentError: If it says nothing of sizes, or does what is not known here.
        """
        processor = getattr(processor, "image_processor", processor)
        get = _reader(processor, "size", "an image processor of transformers or its dict")
        for name in ("do_flip_channel_order", "rescale_offset"):
            if get(name):
                _refuse(name, "left out: it is not known here", get(name))
        cut = _side_or_sides(get("crop_size")) if get("do_center_crop") else None
        size, share = get("size"), get("crop_pct")
        given = _side_or_sides(size)
        if not get("do_resize", True) or given is None:
            raise InvalidArgumentError(
                "Expected a processor that resizes to a shortest_edge, or to height and width. Got "
                f"size {size!r}: give Preprocessing(height=..., width=..., ...)."
            )
        resize: Resize = "shorter_side" if isinstance(given, int) else "stretch"
        resize_to = given if isinstance(given, int) else None
        if isinstance(given, int) and share and cut is None:  # as ConvNeXT's
            cut, resize_to = (given, given), int(given / share)
            if given >= 384:
                resize, resize_to = "stretch", None
        elif cut is None and isinstance(given, int):
            raise InvalidArgumentError(
                f"Expected inputs of one size. Got shortest_edge {given} without a crop: give "
                "Preprocessing(height=..., width=..., ...)."
            )
        elif isinstance(given, tuple) and cut not in (None, given):
            if given[0] != given[1]:
                _refuse("size", "as high as wide where the centre is cut", size)
            resize_to = given[0]
        sides = cut or given
        height, width = (sides, sides) if isinstance(sides, int) else sides
        scale, rescales = get("rescale_factor"), get("do_rescale", True)
        normalises = get("do_normalize", True)
        mean = _numbers(get("image_mean"), (0.0,)) if normalises else 0.0
        return cls(
            height=height,
            width=width,
            channels=1 if isinstance(mean, tuple) and len(mean) == 1 and mean != (0.0,) else 3,
            resize=resize,
            resize_to=resize_to,
            interpolation=_interpolation(get("resample")),
            mean=mean,
            deviation=_numbers(get("image_std"), (1.0,)) if normalises else 1.0,
            white=255 * float(scale or 1 / 255) if rescales else 255.0,
        )


@dataclass(frozen=True, kw_only=True)
class TextPreprocessing:
    """The way from a text to token ids.

    Attributes:
        tokenizer: The tokenizer, as the JSON that the tokenizers library reads.
        max_tokens: Longer texts are cut to so many tokens.
        pad_id: What stands where a shorter text of a batch has no token.
    """

    tokenizer: str = field(repr=False)
    max_tokens: int
    pad_id: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= _MOST_TOKENS:
            _refuse("max_tokens", f"an int in [1, {_MOST_TOKENS}]", self.max_tokens)
        if not 0 <= self.pad_id < 2**31:
            _refuse("pad_id", "an int of at least 0", self.pad_id)
        _parsed(self.tokenizer)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: object, *, max_tokens: int | None = None, pad_id: int | None = None
    ) -> TextPreprocessing:
        """Read a tokenizer.

        Args:
            tokenizer: A fast tokenizer of transformers, one of the tokenizers library, or the path
                of a ``tokenizer.json``.
            max_tokens: Most tokens of a text; None for what the tokenizer says.
            pad_id: Id of padding; None for what the tokenizer says.
        Returns:
            The preprocessing.
        Raises:
            InvalidArgumentError: If it is no such tokenizer, or does not say one of the two.
            DataNotFoundError: If there is no such file.
        """
        if isinstance(tokenizer, str | Path):
            try:
                text = Path(tokenizer).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise DataNotFoundError(
                    f"Expected a tokenizer.json at {tokenizer}. Cannot read it: {reason(error)}."
                ) from error
        else:
            fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
            to_str = getattr(fast, "to_str", None)
            if to_str is None:
                raise InvalidArgumentError(
                    "Expected a fast tokenizer of transformers, one of the tokenizers library, or "
                    f"the path of a tokenizer.json. Got a {type(tokenizer).__name__}."
                )
            text = str(to_str())
        said = _parsed(text)
        return cls(
            tokenizer=text,
            max_tokens=_said("max_tokens", max_tokens, _most_tokens(tokenizer, said)),
            pad_id=_said("pad_id", pad_id, _pad_id(tokenizer, said)),
        )


AnyPreprocessing = Preprocessing | TextPreprocessing


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer beside a JSON file that names it.

    Attributes:
        file: Name of the file in the same folder.
        sha256: Hash of that file.
        max_tokens: As of :class:`TextPreprocessing`.
        pad_id: As of :class:`TextPreprocessing`.
    """

    file: str
    sha256: str
    max_tokens: Annotated[int, Meta(ge=1, le=_MOST_TOKENS)]
    pad_id: Annotated[int, Meta(ge=0, lt=2**31)]


def write_preprocessing(
    folder: Path, preprocessing: AnyPreprocessing | None
) -> tuple[Preprocessing | None, TokenizerFile | None]:
    """Write a tokenizer into a folder; what its JSON file says of pictures, and of texts."""
    if preprocessing is None or isinstance(preprocessing, Preprocessing):
        return preprocessing, None
    if not isinstance(preprocessing, TextPreprocessing):
        raise InvalidArgumentError(
            "The 'preprocessing' parameter must be a Preprocessing or a TextPreprocessing. "
            f"Got a {type(preprocessing).__name__}."
        )
    content = preprocessing.tokenizer.encode()
    (folder / TOKENIZER_FILE).write_bytes(content)
    return None, TokenizerFile(
        file=TOKENIZER_FILE,
        sha256=hashlib.sha256(content).hexdigest(),
        max_tokens=preprocessing.max_tokens,
        pad_id=preprocessing.pad_id,
    )


def read_texts(folder: Path, said: TokenizerFile) -> TextPreprocessing:
    """Read a tokenizer that :func:`write_preprocessing` wrote, and make sure that it is that."""
    path = folder / said.file
    if Path(said.file).name != said.file:
        raise ArtifactError(f"Expected a tokenizer in {folder}. Got {said.file!r}.")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != said.sha256:
        raise ArtifactError(
            f"{path} is missing or not the file that was written with it. Copy the whole folder, "
            "or write it again."
        )
    return TextPreprocessing(
        tokenizer=content.decode(), max_tokens=said.max_tokens, pad_id=said.pad_id
    )


def _refuse(name: str, expected: str, value: object) -> None:
    raise InvalidArgumentError(f"The {name!r} parameter must be {expected}. Got {value!r}.")


def _per_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    """One number for each channel."""
    try:
        numbers = tuple(map(float, value)) if hasattr(value, "__len__") else (float(value),)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels or not all(abs(number) < 1e9 for number in numbers):
        _refuse(name, f"one number, or one for each of {channels} channels", value)
    return numbers


def _reader(source: object, needed: str, expected: str) -> Callable[..., Any]:
    """Make a function that reads a field by its name, of a dict or of an object."""
    as_dict = getattr(source, "to_dict", None)
    content = source if isinstance(source, Mapping) or as_dict is None else as_dict()

    def get(name: str, default: Any = None) -> Any:
        value = content.get(name) if isinstance(content, Mapping) else getattr(content, name, None)
        return default if value is None else value

    if get(needed) is None:
        raise InvalidArgumentError(
            f"Expected {expected}, with {needed} in it. Got a {type(source).__name__}."
        )
    return get


def _numbers(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    return tuple(map(float, value)) if hasattr(value, "__len__") else (float(value),)


def _side_or_sides(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or height and width; None for what is neither."""
    if isinstance(size, int):
        return size
    said = size if isinstance(size, Mapping) else vars(size) if hasattr(size, "__dict__") else {}
    height, width, shortest = said.get("height"), said.get("width"), said.get("shortest_edge")
    if height and width:
        return (int(height), int(width))
    return int(shortest) if shortest and not said.get("longest_edge") else None


def _interpolation(resample: Any) -> Interpolation:
    names: tuple[Interpolation, ...] = get_args(Interpolation)
    if resample is None:
        return "bilinear"
    value = getattr(resample, "value", resample)  # of an enum: Pillow's numbers, or names
    if isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    named = str(value).lower()
    if named not in names:
        _refuse("resample", f"one of {', '.join(names)}", resample)
    return next(name for name in names if name == named)


def _parsed(tokenizer: str) -> Mapping[str, Any]:
    try:
        said = parse_json(tokenizer)
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected a tokenizer as the tokenizers library writes it. It is no JSON ({error})."
        ) from error
    if not isinstance(said, Mapping) or "model" not in said:
        raise InvalidArgumentError(
            "Expected a tokenizer as the tokenizers library writes it, with a model in it. Got "
            "other JSON."
        )
    return said


def _said(name: str, given: int | None, found: int | None) -> int:
    value = found if given is None else given
    if value is None:
        raise InvalidArgumentError(
            f"The tokenizer does not say {name}: give from_tokenizer(..., {name}=...)."
        )
    return value


def _most_tokens(tokenizer: object, said: Mapping[str, Any]) -> int | None:
    most = getattr(tokenizer, "model_max_length", None)
    if isinstance(most, int) and most <= _MOST_TOKENS:  # else a number that stands for no limit
        return most
    return (said.get("truncation") or {}).get("max_length")


def _pad_id(tokenizer: object, said: Mapping[str, Any]) -> int | None:
    own = getattr(tokenizer, "pad_token_id", None)
    if isinstance(own, int):
        return own
    padding = said.get("padding")
    if padding:
        return int(padding["pad_id"])
    known = {token["content"]: token["id"] for token in said.get("added_tokens", ())}
    return next((known[name] for name in ("[PAD]", "<pad>") if name in known), None)
