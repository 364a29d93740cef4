"""The main job: from a folder of scans to trained networks and their scores."""

from .plan import Plan, propose
from .run import Run
from .settings import Settings, SettingsError, parser

__all__ = ["Plan", "Run", "Settings", "SettingsError", "parser", "propose"]
