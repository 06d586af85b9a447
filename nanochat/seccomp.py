"""
A system-call filter for the sandbox of execution.py: it refuses (EPERM) calls that programs under test do not need.

These are calls that hold memory outside the limits of the process (System V IPC, memfd) and calls that have often been
used to escape from sandboxes (new namespaces, io_uring, bpf, keyrings, tracing).
"""

import platform
import struct

# machine -> (AUDIT_ARCH of the kernel, numbers of the refused calls)
REFUSED = {
    "x86_64": (
        0xC000003E,
        {
            "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "mount": 165, "add_key": 248,
            "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308,
            "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319, "bpf": 321,
            "userfaultfd": 323, "io_uring_setup": 425, "open_tree": 428, "fsopen": 430, "memfd_secret": 447,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "mount": 40, "unshare": 97, "ptrace": 117, "msgget": 186, "semget": 190, "shmget": 194,
            "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "setns": 268,
            "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
            "userfaultfd": 282, "io_uring_setup": 425, "open_tree": 428, "fsopen": 430, "memfd_secret": 447,
        },
    ),
}  # fmt: skip

LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF operations
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
OTHER_ABI = 0x40000000  # x32 calls on x86-64: the same kernel functions under other numbers


def filter_program() -> bytes | None:
    """The filter as an array of struct sock_filter for this machine; None for a machine not in the table."""
    if platform.machine() not in REFUSED:
        return None
    arch, numbers = REFUSED[platform.machine()]
    refused = sorted(numbers.values())
    to_refuse = len(refused) + 1  # instructions between the first comparison and the last line
    program = [(LOAD, 0, 0, 4), (IF_EQUAL, 0, to_refuse + 2, arch)]  # the same numbers mean other calls in another ABI
    program += [(LOAD, 0, 0, 0), (IF_AT_LEAST, to_refuse, 0, OTHER_ABI)]
    program += [(IF_EQUAL, to_refuse - 1 - i, 0, number) for i, number in enumerate(refused)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
