"""Evaluation: a suite of lm-eval tasks on several models, as one table.

    suite -> tasks (found and checked in lm-eval), models -> preflight -> process (a child a model) -> measure -> rows
    (kept one by one) -> tables (text, Markdown, CSV, JSON, HTML; comparability says what was not measured alike)

The parent checks everything and keeps results; one child a model loads it and runs lm-eval (`backends`: vLLM or
transformers). `datafiles` hashes what defines a task, `official_data` has a folder stand in for the Hub, `protocol/`
has tasks of ours, `standard_error` and `code_eval` stand in for lm-eval's, `results` is what results.json holds,
`seen_items` counts items that models were made with, `compare` is wp-compare, `greedy_answers` is wp-answers, which
asks vLLM too.
"""
