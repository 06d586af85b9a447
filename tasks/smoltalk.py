"""SmolTalk: general conversations, in the version for small models (Allal et al. 2025, arXiv:2502.02737)."""

from tasks.common import Task
from tasks.hub import load_split


class SmolTalk(Task):
    """split: "train" (460K conversations) or "test" (24K). Has no right answers to evaluate."""

    def __init__(self, split: str, **slicing):
        super().__init__(**slicing)
        if split not in ("train", "test"):
            raise ValueError(f"SmolTalk has no split {split!r}")
        self.rows = load_split("HuggingFaceTB/smol-smoltalk", "default", split, ("messages",))

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        messages = self.rows[index]["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
