"""A program's words on their way through shells that do not quote them: pdsh's, and those of hosts.

DeepSpeed puts only words with spaces in quotes, so a `[0,3]`, a `$` or a `;` would be read by every host's shell.
Words of letters that mean nothing to a shell travel as they are; others in an alphabet that has no other letters.
"""

import base64
import re

HARMLESS = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
WRAPPED = "wrapped:"


def wrap(word: str) -> str:
    if HARMLESS.fullmatch(word) and not word.startswith(WRAPPED):
        return word
    return WRAPPED + base64.urlsafe_b64encode(word.encode()).decode()


def unwrap(word: str) -> str:
    if not word.startswith(WRAPPED):
        return word
    return base64.urlsafe_b64decode(word.removeprefix(WRAPPED)).decode()
