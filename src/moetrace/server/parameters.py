"""What the request schemas share: parameters that are refused by name, and greedy by temperature."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moetrace.errors import RequestError


def require_neutral(
    given: Mapping[str, Any],
    neutral: Mapping[str, tuple[Any, ...]],
    known: Collection[str],
    ignored: Collection[str] = (),
) -> None:
    """Raise `RequestError` for the first parameter that is unknown, or has a value that would make a difference.

    Args:
        given: parameters that a schema has no field for.
        neutral: parameters that are not supported, and the values under which that makes no difference.
        known: names of the schema's fields.
        ignored: parameters that make no difference, whatever their value.
    """
    for name, value in given.items():
        if name in ignored:
            continue
        if name not in neutral:
            expected = ", ".join(sorted({*known, *neutral, *ignored}))
            raise RequestError(f"parameter {name!r} is unknown", expected=expected, got=name, param=name)
        if not is_neutral(value, neutral[name]):
            shown = repr(value)
            raise RequestError(
                f"parameter {name!r} is not supported by this server",
                expected=" or ".join(["it absent", *(repr(each) for each in neutral[name] if each is not None)]),
                got=shown if len(shown) <= 80 else f"{shown[:77]}...",
                param=name,
            )


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of some, for JSON: there false is not 0."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def close(schema: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]], ignored: Collection[str] = ()) -> None:
    """Describe in a JSON schema what `require_neutral` demands."""
    schema["additionalProperties"] = False
    for name, values in neutral.items():
        schema["properties"][name] = {"enum": list(values), "description": "not supported; may be sent as neutral"}
    for name in ignored:
        schema["properties"][name] = {"description": "makes no difference"}


def by_temperature(temperature: float) -> dict[str, Any]:
    """`SamplingParams` of dialects that say greedy by a temperature of 0.

    Raises:
        RequestError: it is neither 0 nor in the range of temperatures.
    """
    if temperature == 0:
        return {"do_sample": False}
    if not 1e-3 <= temperature <= 1e6:
        raise RequestError(
            "temperature is out of range",
            expected="0 (greedy), or 0.001 to 1000000",
            got=temperature,
            param="temperature",
        )
    return {"do_sample": True, "temperature": temperature}
