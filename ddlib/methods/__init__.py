"""Every method by name. A method owns its synthetic images and offers `step`, `state_dict` and `load_state_dict`."""

from .coreset import KINDS, Coreset
from .dm import DM
from .trajectory import Trajectory

METHODS = {kind: Coreset for kind in KINDS} | {"dm": DM} | dict.fromkeys(("mtt", "tesla", "ftd", "datm"), Trajectory)
