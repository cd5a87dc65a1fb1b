"""Messages of the library in the words of the command line."""

from __future__ import annotations

_WORDS = (
    ("resume=True", "--resume"),
    ("Choose another folder", "Choose another folder with --out"),
    ("data=DIR", "--data DIR"),
    ("data=emnist-balanced", "--data emnist-balanced"),
    ("data=PATH", "--data PATH"),
    ("Say which: split=NAME", "Say which: --split NAME"),
    ("one of them with split", "one of them with --split"),
    ("The 'subset' parameter", "--subset"),
    ("thresholds by hand", "thresholds by hand with --thresholds"),
    ("calibration_share=0.1", "--set calibration_share=0.1"),
    ("plain=True", "--plain"),
    (
        "Build it and give it: load(folder, network=...)",
        "Name the file that builds it: --network FILE.py:function",
    ),
    ("max_risk=... and risk=", "--max-risk and --risk "),
)
"""Pairs of a Python argument and the option that is the same."""


def in_options(message: str) -> str:
    """Say a message of the library so that it names options.

    Example:
        >>> in_options("Go on with resume=True. Choose another folder.")
        'Go on with --resume. Choose another folder with --out.'
    """
    for parameter, option in _WORDS:
        message = message.replace(parameter, option)
    return message
