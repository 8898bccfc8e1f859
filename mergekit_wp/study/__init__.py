"""wp-study: what a fine-tune changed, and where, for one pair of models that was scored.

    study_spec   what a STUDY.yaml says            cli       wp-study: the plan, then the parts that are due
    inputs       score files and models, checked   parts     which parts there are; what is done and still right
    scored       score files that are made first
    sets         top sets, overlaps, correlations  drawings  pictures of several parts

Each part is a module of its own, with its algorithm and the paper's figures at its top:

    maps         score maps, top sets compared     drift     what changed, and whether that predicts scores
    certainty    how far scores hang on the prompts
    words        vectors as tokens: `readout` reads them, `at_anchor` has what prompts leave, `readings` compares
    attention    whether heads look at the instruction: `regions` reads it without matrices of attention
    set_curves   part `sets`, exchanged while models run: `set_plan` which, `held_out` on which prompts,
                 `set_effects` what they do, `set_rows` the numbers with controls, `set_page` what is said and drawn
    set_answers  part `answers`, the same by what models say: `answer_plan` which models, `answer_run` how they answer
                 and are graded, `answer_rows` the numbers, `answer_page` what is said and drawn
    cases        single prompts, side by side

**A part is added** by a module with a `PART` (`parts.Part`) and a line in `parts.PARTS`. Its `work` is a function of
(study, inputs, progress) and gives a `parts.PartResult`: data, tables, pictures and a section of the page. Writing,
resuming and the page are done for it.
"""
