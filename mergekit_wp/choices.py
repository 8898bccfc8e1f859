"""What a score can be by, as jobs, score files and flags spell it; nothing is imported, so that help is quick."""

METHODS = ("writeback", "attr", "exact", "atp", "ap")
ACTIVATION_SIDE = ("ap", "atp")
OBJECTS = ("write", "activation")  # of the activation side
UTILITIES = ("kl", "staged", "staged-projection", "anchor", "projection")
SPLITS = ("half", "shared")
GAPS = ("sample", "mean")
COMPONENTS = ("all", "heads", "neurons")  # or a file that names some
RANKS = ("mean", "task", "mean-abs", "task-abs")
OFFLOADS = ("auto", "none", "stream")
RUN_DTYPES = ("auto", "float32", "bfloat16", "float16")
FIT_FAMILIES = ("scale", "expert", "layer", "component", "cross")  # what of a merge is fitted (`fit_file`)
FIT_STARTS = ("average", "scores")
