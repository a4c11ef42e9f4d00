"""Pretrain a BERT: the program that the `deepspeed` launcher starts on every rank.

deepspeed --module pretrain.bert RUN.yaml --deepspeed_config ds_configs/zero1.json train.steps=100
"""

from pretrain.program import end_process, run_program


def main(argv: list[str] | None = None) -> int:
    """0 when all steps are done or a signal was obeyed, 2 with one line on a user's mistake."""
    return run_program("pretrain.bert", __doc__, argv)


if __name__ == "__main__":
    end_process(main())
