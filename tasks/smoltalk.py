"""SmolTalk: general conversations, in the version for small models (Allal et al. 2025, arXiv:2502.02737)."""

from tasks.hub import HubTask


class SmolTalk(HubTask):
    """split: "train" (460K conversations) or "test" (24K). Has no right answers to evaluate."""

    repo, columns = "HuggingFaceTB/smol-smoltalk", ("messages",)
    splits = dict.fromkeys(("default",), ("train", "test"))

    def __init__(self, split: str, **slicing):
        super().__init__("default", split, **slicing)

    def get_example(self, index):
        messages = self.rows[index]["messages"]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
