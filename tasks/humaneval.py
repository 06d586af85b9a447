"""
HumanEval: complete a Python function from its signature and docstring (Chen et al. 2021, arXiv:2107.03374).

A completion counts when it passes the tests, run in the sandbox of nanochat/execution.py.
"""

import re

from nanochat.execution import execute_code
from tasks.hub import HubTask

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
TIMEOUT = 5.0  # seconds


def extract_imports(prompt: str) -> str:
    """The import lines at the head of a prompt; completions often rely on them without repeating them."""
    imports = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return "\n".join(imports)


def extract_program(completion: str) -> str:
    """The code in an answer: what the first Markdown fence holds, else all of it."""
    match = FENCE.search(completion)
    return match[1] if match else completion


class HumanEval(HubTask):
    """164 problems."""

    repo, columns = "openai/openai_humaneval", ("prompt", "canonical_solution", "test", "entry_point")
    splits = dict.fromkeys(("openai_humaneval",), ("test",))

    def __init__(self, **slicing):
        super().__init__("openai_humaneval", "test", **slicing)

    def get_example(self, index):
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["prompt"] + "\n" + row["canonical_solution"]},
        ]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation, assistant_response):
        """Whether the program passes all tests. Raises SandboxUnavailable where it cannot be run safely."""
        prompt = conversation["messages"][0]["content"]
        program = extract_imports(prompt) + "\n\n" + extract_program(assistant_response)
        # Some tests use helpers that the prompt defines above the function to complete, hence the prompt.
        check = prompt.rstrip() + "\n    pass\n\n" + conversation["test"]
        return execute_code(program, TIMEOUT, check=check, entry_point=conversation["entry_point"]).success
