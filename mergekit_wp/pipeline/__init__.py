"""wp-run: a pipeline file (`spec`) becomes steps (`steps`), which are looked ahead at (`look_ahead`) and carried out
(`mergekit_wp.execute`) where their inputs have changed.
"""
