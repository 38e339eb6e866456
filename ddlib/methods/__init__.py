"""Every method by name. A method owns its synthetic images and offers `step`, `state_dict` and `load_state_dict`."""

from .coreset import KINDS, Coreset
from .dm import DM
from .frepo import FRePo
from .gradient import Gradient
from .trajectory import Trajectory

METHODS = (
    {kind: Coreset for kind in KINDS}
    | {"dm": DM, "frepo": FRePo}
    | dict.fromkeys(("dc", "dsa", "idc", "dream", "dream_plus"), Gradient)
    | dict.fromkeys(("mtt", "tesla", "ftd", "datm"), Trajectory)
)
