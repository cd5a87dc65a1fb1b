"""The model card of a run that is shared: what it is, how to load it, what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from offramp.data.sources import SOURCES
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.families import family_for
from offramp.families.family import Family
from offramp.measure.outputs import QUALITY_NAMES, outputs_judged_by
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.recipes.recipe import Recipe
from offramp.runtime import Bundle

_LOAD_IMAGES = """\
```python
import torch
from offramp import {runner}, from_pretrained

run = from_pretrained("{name}")
images = torch.zeros(2, {shape}, dtype=torch.uint8)  # yours, as those of {data}, 0 to 255
inputs = run.recipe.normalisation(images)
{use}
```

On the command line, `offramp pull` brings the files into a run folder of your own, and
`offramp predict` prepares upright pictures of any size as those of {data} are.
"""
_LOAD_TEXTS = """\
```python
from offramp import {runner}, encode_padded, from_pretrained, load_tokenizer

run = from_pretrained("{name}")
inputs = encode_padded(load_tokenizer(), ["yours", "one sentence each"])
{use}
```

On the command line, `offramp pull` brings the files into a run folder of your own, and
`offramp predict` takes sentences.
"""
_LOAD_OWN = """\
The network is no recipe's: build it as it was built for training, and give it to be filled.

```python
from offramp import {runner}, from_pretrained

run = from_pretrained("{name}", network=network)
{use}
```
"""
_LOAD_BUNDLE = """\
A bundle: ONNX files with the decisions in them, which run without torch.

```python
from huggingface_hub import snapshot_download
from offramp.runtime import Session

session = Session(snapshot_download("{name}"))
result = session.run({inputs})
print(result.output.argmax(1), result.exit_index, result.macs)
```

It takes {shapes}, `B` samples. On the command line, `offramp pull` brings the files into a folder
of your own, which `offramp predict`, `evaluate`, `time`, `calibrate` and `serve` take.
"""
_USE = """\
result = {runner}(run.network, run.policy).run(inputs)
{use}"""
_USE_EXITS = """\
logits = run.network(inputs)  # of every exit: no policy was chosen yet"""


def model_card(
    name: str,
    *,
    recipe: Recipe | None,
    policy: Policy | RoutingPolicy | None,
    calibration: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    bundle: Bundle | None = None,
) -> str:
    """Write the card of a run or a bundle."""
    trained = ""
    if recipe is not None:
        trained = f", trained on `{recipe.data}` by Offramp's recipe `{recipe.name}`"
        trained += "" if recipe.variant == "adaptive" else f" in its variant `{recipe.variant}`"
    family = family_for(policy)
    exits = "" if policy is None else f", with {_count(policy.num_exits, 'exit')}"
    sections = (
        f"# {name.rsplit('/')[-1]}\n",
        f"A network that {family.words.ability.format(exits=exits)}{trained}.\n",
        "## Load it\n",
        _loading(name, recipe, policy) if bundle is None else _loading_bundle(name, bundle),
        f"## {family.words.heading}\n",
        _describe_policy(policy, calibration),
        "## Measured\n",
        _describe_evaluation(recipe, evaluation, family),
        f"Written by offramp {version('offramp')}.\n",
    )
    head = _metadata(name, recipe, evaluation, family, bundle).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n\n" + "\n".join(sections)))


def check_evaluation(
    evaluation: Mapping[str, Any], *, recipe: Recipe | None, policy: Policy | RoutingPolicy | None
) -> None:
    """Refuse figures that are not those of ``offramp evaluate --json``, or are of another run."""
    try:
        rows = [(int(row["index"]), row["accuracy"], row["share"]) for row in evaluation["exits"]]
        fractions = [x for row in rows for x in row[1:]]
        for quality in outputs_judged_by(evaluation).qualities:
            fractions += [evaluation[quality], evaluation[f"final_exit_{quality}"]]
            fractions.append(evaluation[f"plain_{quality}"] or 0)
            fractions += [row[quality] for row in evaluation["exits"]]
        counts = [evaluation[key] for key in ("num_samples", "mean_macs", "plain_macs")]
        own_fractions, own_counts = family_for(policy).figures(evaluation)
        fractions += own_fractions
        counts += own_counts
        counts += [row["macs"] for row in evaluation["exits"]]
        is_sound = all(0 <= x <= 1 for x in fractions) and all(0 < x < math.inf for x in counts)
        is_sound &= math.isclose(sum(share for _, _, share in rows), 1, abs_tol=1e-6)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidArgumentError(
            "Expected the figures that offramp evaluate --json writes, or Evaluation.to_dict(). "
            f"Got something else ({error!r})."
        ) from error
    if not is_sound:
        raise InvalidArgumentError(
            "Expected figures of an evaluation: accuracies in [0, 1], shares that sum to 1, "
            f"positive counts. Got {dict(evaluation)!r:.200}."
        )
    of = evaluation.get("recipe")
    if of is not None and of != (None if recipe is None else recipe.name):
        raise InvalidArgumentError(
            f"The figures are of the recipe {of!r}. The run is of "
            f"{'no recipe' if recipe is None else repr(recipe.name)}: evaluate this one."
        )
    # A bundle leaves exits out that are off: fewer rows than exits are no contradiction.
    if policy is None or rows[-1][0] != policy.num_exits - 1:
        raise InvalidArgumentError(
            f"The figures are of a network with {_count(rows[-1][0] + 1, 'exit')}. The run "
            + ("has no policy." if policy is None else f"has {policy.num_exits}.")
            + " Evaluate it as it is."
        )


def _metadata(
    name: str,
    recipe: Recipe | None,
    evaluation: Mapping[str, Any] | None,
    family: Family[Any, Any],
    bundle: Bundle | None,
) -> ModelCardData:
    words, results = family.words, []
    task = None if bundle is None else _task_of(bundle)
    if recipe is not None and evaluation is not None and not evaluation.get("in_sample"):
        results = [
            EvalResult(
                task_type=_task(recipe),
                dataset_type=recipe.data,
                dataset_name=recipe.data,
                dataset_split=evaluation.get("split"),
                metric_type=quality,
                metric_name=f"{QUALITY_NAMES[quality]} {metric_name}",
                metric_value=evaluation[key],
            )
            for quality in outputs_judged_by(evaluation).qualities
            for key, metric_name in (
                (quality, words.less_metric),
                (f"final_exit_{quality}", words.whole_metric),
            )
        ]
    return ModelCardData(
        library_name="offramp",
        pipeline_tag=task if recipe is None else _task(recipe),
        tags=[words.tag, "adaptive-computation"],
        datasets=None if recipe is None else [recipe.data],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.rsplit("/")[-1] if results else None,
        eval_results=results or None,
    )


def _task(recipe: Recipe) -> str:
    """Name what the recipe is for, in the hub's words."""
    source = SOURCES[recipe.data]
    if source.image_shape is None:
        return "text-classification"
    return "image-classification" if source.ignored_label is None else "image-segmentation"


def _task_of(bundle: Bundle) -> str | None:
    if bundle.pixel_multiple is not None:
        return "image-segmentation"
    if bundle.texts is not None:
        return "text-classification"
    return None if bundle.pictures is None else "image-classification"


def _loading_bundle(name: str, bundle: Bundle) -> str:
    shapes = [
        f"`{spec.name}`, {spec.dtype} of shape "
        f"({', '.join(['B', *('any' if n is None else str(n) for n in spec.sample_shape)])})"
        for spec in bundle.inputs
    ]
    names = ", ".join(spec.name for spec in bundle.inputs)
    loading = _LOAD_BUNDLE.format(name=name, inputs=names, shapes=" and ".join(shapes))
    classes = ", ".join(bundle.class_names)
    return f"{loading}\nClasses: {classes}.\n" if classes else loading


def _loading(name: str, recipe: Recipe | None, policy: Policy | RoutingPolicy | None) -> str:
    family = family_for(policy)
    runner = family.runner.__name__
    use = _USE.format(runner=runner, use=family.words.use)
    parts = {"name": name, "use": _USE_EXITS if policy is None else use, "runner": runner}
    if recipe is None:
        return _LOAD_OWN.format(**parts)
    image_shape = SOURCES[recipe.data].image_shape
    if image_shape is None:
        return _LOAD_TEXTS.format(**parts)
    shape = ", ".join(map(str, image_shape))
    return _LOAD_IMAGES.format(shape=shape, data=recipe.data, **parts)


def _describe_policy(
    policy: Policy | RoutingPolicy | None, calibration: Mapping[str, Any] | None
) -> str:
    if policy is None:
        return "No policy was chosen yet: `offramp calibrate RUN --max-drop 0.01` chooses one.\n"
    one_rule = family_for(policy).words.rule
    if one_rule:
        rule = one_rule.format(policy=policy)
        if calibration is None:
            return f"{rule} No other was chosen: the network was trained for this one.\n"
    elif policy.num_exits == 1:
        return "There is one exit, and every sample goes to it.\n"
    else:
        rule = _describe_exits(policy)
    try:
        return f"{rule}\n\n{_describe_choice(calibration or {})}"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"The policy.json is damaged: it says of the choice {calibration!r:.200}. "
            "Calibrate the run again."
        ) from error


def _describe_exits(policy: Any) -> str:
    described = policy_to_dict(policy)
    how = f"`{described.get('rule', described['kind'])}`"
    if "patience" in described:
        how += f", {described['patience']} exits in agreement"
    rows = ["| exit | leaves if the confidence is at least | temperature |", "|---|---|---|"]
    for k in range(policy.num_exits - 1):
        setting = policy.setting(k)
        bound = "never: this exit is off" if policy.is_off(k) else f"{setting.threshold:.4f}"
        rows.append(f"| {k} | {bound} | {setting.temperature:g} |")
    rows.append(f"| {policy.num_exits - 1} | always: it is the final exit | |")
    return "\n".join([f"Confidence by the rule {how}.\n", *rows])


def _describe_choice(calibration: Mapping[str, Any]) -> str:
    """Say what was asked, on which data, what it reached there, and the promise."""
    asked, data = calibration.get("asked") or {}, calibration.get("data")
    reached, promise = calibration.get("reached"), calibration.get("guarantee")
    wishes = ", ".join(f"{key} {_plain(x)}" for key, x in asked.items() if x is not None)
    lines = [f"Asked: {wishes}."]
    if not wishes:
        lines = ["How it was chosen is not recorded."]
    elif data is None:
        lines.append("Set by hand, on no data.")
    else:
        lines.append(
            f"Chosen on {data['num_samples']:,} samples of the split {data['split']} of "
            f"`{data['name']}` (classes {_prior(data['class_prior'])})."
        )
        if reached is not None:
            quality = outputs_judged_by(reached).qualities[0]
            lines.append(
                f"There, and so in sample: {QUALITY_NAMES[quality]} "
                f"{_percent(reached[quality])} at {reached['mean_macs']:,.0f} mean MACs."
            )
    if promise is not None:
        lines.append(f"\nThe promise:\n\n> {promise['sentence']}")
    return "\n".join(lines) + "\n"


def _describe_evaluation(
    recipe: Recipe | None, evaluation: Mapping[str, Any] | None, family: Family[Any, Any]
) -> str:
    words = family.words
    if evaluation is None:
        return (
            "Nothing was measured for this card. `offramp evaluate RUN` measures; "
            "`offramp push RUN REPO` measures and writes the figures here.\n"
        )
    mean_macs, plain_macs = evaluation["mean_macs"], evaluation["plain_macs"]
    where = f"{evaluation['num_samples']:,} samples"
    data = evaluation.get("data") if recipe is None else recipe.data
    if data is not None and "split" in evaluation:
        where += f" of the split {evaluation['split']} of `{data}`"
    else:
        where += "; which ones is not recorded"
    if evaluation.get("in_sample"):
        where += ". IN SAMPLE: training or thresholds saw them, the figures can be too good"
    qualities = outputs_judged_by(evaluation).qualities
    names = [QUALITY_NAMES[quality] for quality in qualities]

    def cells(whose: str) -> str:
        return " | ".join(_percent(evaluation[whose + quality]) for quality in qualities)

    # What running all of it costs is a figure of exits alone.
    macs = "" if family.parts_table else f"{evaluation['exits'][-1]['macs']:,}"
    lines = [
        f"On {where}.\n",
        *(family.parts_table or _exits_table)(evaluation),
        "",
        f"| | {' | '.join(names)} | MACs a sample |",
        "|---|" + "---|" * len(names) + "---|",
        f"| {words.less} | {cells('')} | {mean_macs:,.0f} on average, "
        f"{_percent(mean_macs / plain_macs)} of the plain network's {plain_macs:,} |",
        f"| {words.whole} | {cells('final_exit_')} | {macs} |",
    ]
    if evaluation[f"plain_{qualities[0]}"] is None:
        lines.append("\nNo plain network trained as long was measured beside it.")
    else:
        plain = f"{names[0]} {_percent(evaluation[f'plain_{qualities[0]}'])}"
        lines.append(f"\nA plain network trained as long, on the same samples: {plain}.")
    lines.append("MACs include heads, gates and the policy. See it again: `offramp evaluate RUN`.")
    return "\n".join(lines) + "\n"


def _exits_table(evaluation: Mapping[str, Any]) -> list[str]:
    quality = outputs_judged_by(evaluation).qualities[0]
    rows = [
        f"| {row['index']} | {_percent(row[quality])} | {_percent(row['share'])} "
        f"| {row['macs']:,} |"
        for row in evaluation["exits"]
    ]
    head = f"| exit | {QUALITY_NAMES[quality]} alone | samples leaving | MACs |"
    return [head, "|---|---|---|---|", *rows]


def _prior(prior: Any) -> str:
    return "weighted by given shares" if isinstance(prior, dict) else str(prior)


def _plain(value: Any) -> str:
    return f"{value:,.10g}" if isinstance(value, float) else str(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
