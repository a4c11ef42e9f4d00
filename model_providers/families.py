"""The model families, by the name that a run file gives: what builds the plan of each.

The program that trains a family is `pretrain.<name>`.
"""

from model_providers import bert, gpt, t5

PLAN_BUILDERS = {"gpt": gpt.build_plan, "bert": bert.build_plan, "t5": t5.build_plan}
