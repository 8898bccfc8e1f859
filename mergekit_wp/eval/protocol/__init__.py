"""MATH and GSM8K as AIM and WIDEN ask these experts: lm-eval tasks `wp_math` and `wp_gsm8k`, for `eval/paper.yaml`.

Zero shots, the Alpaca prompt ending in "Let's think step by step.", greedy, 1024 tokens; prompt, limits, stops and
the order in which an answer is looked for are those of AIM (ahnobari/ActivationInformedMerging, `evaluate_model.py`
and `EvalUtils/MathUtils`). `answers.py` says where the comparison differs. Every suite finds these tasks.
"""
