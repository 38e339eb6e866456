"""Every method by name. A method owns its synthetic images and offers `step`, `state_dict` and `load_state_dict`."""


from .dm import DM

METHODS = {"dm": DM}
