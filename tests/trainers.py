"""What the tests of trainers do with flags and logs."""

import json
from pathlib import Path


def history(output: object, name: str) -> list[float]:
    """A logged value, by step."""
    state = json.loads((Path(str(output)) / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def without(flags: dict[str, object], *names: str) -> dict[str, object]:
    """The other flags."""
    return {name: value for name, value in flags.items() if name not in names}
