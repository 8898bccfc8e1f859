"""The fit: weights of a merge, learnt from the experts' own answers without a label (METHOD.md 6).

    job        what a fit job says              cli        wp-fit
    fit        the run, phase by phase; what is kept of the steps; what goes into the file
    objective  lessons and the loss             gradient   of the loss, by weights
    descent    Adam within the bounds, the best look, the curve
    families   what of a merge has a weight of its own
    cross      weights in one shot, from what experts do to one another's answers

jobs -> prompts and answers (`scoring`) -> lessons -> weights -> fit file (`fit_file`), which `merge_method: wp` reads.
"""
