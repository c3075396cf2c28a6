"""Adds the command ewc-run to an editable install, whose folder has experiments/ and configs/."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableCommand(BuildHookInterface[Any]):
    """A wheel to publish has the library alone, so a command there would find nothing to run."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the script to an editable wheel."""
        if version == "editable":
            build_data["shared_scripts"] = {"scripts/ewc_run.py": "ewc-run"}
