"""Find the routers of a model, and tap them. Needs torch; reads transformers models without importing transformers."""

from moetrace.routers.find import RouterSite, config_layout, find_routers, fingerprint_of, layout_of
from moetrace.routers.selection import RoutingSession, Selection
from moetrace.routers.tap import ModelTap, tap_model

__all__ = [
    "ModelTap",
    "RouterSite",
    "RoutingSession",
    "Selection",
    "config_layout",
    "find_routers",
    "fingerprint_of",
    "layout_of",
    "tap_model",
]
