"""Builds the seccomp filter of jailed programs: what of the kernel they cannot call.

Landlock holds back opening files and signals to others. What is refused here reaches past it: other
processes, mounts, namespaces, sockets, memory that no limit counts.
Source: seccomp(2), linux/bpf_common.h, linux/seccomp.h, the tables of system calls of Linux 6.12.
"""

from __future__ import annotations

import errno
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator

__all__ = ["MACHINES", "build_filter"]

# Number of each call on x86_64 and on aarch64, - where it has none.
_REFUSED = """
mount 165 40         umount2 166 39      pivot_root 155 41     chroot 161 51      open_tree 428 428
move_mount 429 429   fsopen 430 430      fsconfig 431 431      fsmount 432 432    fspick 433 433
mount_setattr 442 442 quotactl 179 60    quotactl_fd 443 443   swapon 167 224     swapoff 168 225
unshare 272 97       setns 308 268       init_module 175 105   finit_module 313 273
delete_module 176 106 kexec_load 246 104 kexec_file_load 320 294 reboot 169 142   bpf 321 280
perf_event_open 298 241 userfaultfd 323 282 syslog 103 116     acct 163 89        uselib 134 -
settimeofday 164 170 clock_settime 227 112 adjtimex 159 171    clock_adjtime 305 266
sethostname 170 161  setdomainname 171 162 iopl 172 -          ioperm 173 -       modify_ldt 154 -
lookup_dcookie 212 18 vhangup 153 58     add_key 248 217       request_key 249 218 keyctl 250 219
ptrace 101 117       kcmp 312 272        process_vm_readv 310 270 process_vm_writev 311 271
pidfd_getfd 438 438  process_madvise 440 440 process_mrelease 448 448
io_uring_setup 425 425 io_uring_enter 426 426 io_uring_register 427 427
name_to_handle_at 303 264 open_by_handle_at 304 265 fanotify_init 300 262 fanotify_mark 301 263
inotify_init 253 -   inotify_init1 294 26 memfd_create 319 279 memfd_secret 447 447
shmget 29 194        shmat 30 196        shmctl 31 195         semget 64 190      semop 65 193
semtimedop 220 192   semctl 66 191       msgget 68 186         msgsnd 69 189      msgrcv 70 188
msgctl 71 187        mq_open 240 180     mq_unlink 241 181     setpriority 141 140 ioprio_set 251 30
sched_setparam 142 118 sched_setscheduler 144 119 sched_setattr 314 274 sched_setaffinity 203 122
migrate_pages 256 238 move_pages 279 239 setxattr 188 5        lsetxattr 189 6    fsetxattr 190 7
removexattr 197 14   lremovexattr 198 15 fremovexattr 199 16
"""
# Landlock does not hold these back: a program could spoil files that it cannot open. They succeed
# and do nothing, for copying and unpacking call them on the way and would stop.
_IGNORED = """
chmod 90 -           fchmod 91 52        fchmodat 268 53       fchmodat2 452 452  chown 92 -
fchown 93 55         lchown 94 -         fchownat 260 54       utime 132 -        utimes 235 -
futimesat 261 -      utimensat 280 88
"""
_SOCKETS = "socket 41 198 connect 42 203 bind 49 200 listen 50 201"
_LOOKED_INTO = """
clone 56 220         clone3 435 435      prlimit64 302 261     socketpair 53 199  socket 41 198
mkdir 83 -           mkdirat 258 34      umask 95 166
"""
_LAST_KNOWN = 462  # of a later call nobody has yet looked at where it leads

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit's name, column above

_LOAD, _AND, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _FIRST, _SECOND, _THIRD = 0, 4, 16, 24, 32  # in seccomp_data, low half first
_NEW_NAMESPACES = 0x7E020000
_STREAM = 1
_OWNERS = 0o700

Instruction = tuple[int, int, int, int]  # operation, jumps when true and when false, operand

# What a call that is looked into must pass: the last step of each jumps over the refusal.
_TESTS: dict[str, tuple[Instruction, ...]] = {
    "clone": ((_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _NEW_NAMESPACES)),
    "prlimit64": ((_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, 0)),  # its own limits, not another's
    # A pair of datagram sockets could send to any other by its name.
    "socketpair": ((_LOAD, 0, 0, _SECOND), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, _STREAM)),
    # IPv4, IPv6, and netlink, from which resolvers learn of interfaces.
    "socket": ((_LOAD, 0, 0, _FIRST), (_EQUAL, 3, 0, 2), (_EQUAL, 2, 0, 10), (_EQUAL, 1, 0, 16)),
    # What it makes can be measured, and removed, by who started it.
    "mkdir": ((_LOAD, 0, 0, _SECOND), (_AND, 0, 0, _OWNERS), (_EQUAL, 1, 0, _OWNERS)),
    "mkdirat": ((_LOAD, 0, 0, _THIRD), (_AND, 0, 0, _OWNERS), (_EQUAL, 1, 0, _OWNERS)),
    "umask": ((_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, _OWNERS)),
}


@functools.cache
def build_filter(machine: str, *, network: bool) -> bytes:
    """Return the filter as the kernel takes it: instructions of eight bytes.

    Args:
        machine: As ``platform.machine()`` names it, one of ``MACHINES``.
        network: Whether the program may reach the internet; other sockets it never can.
    """
    audit, column = MACHINES[machine]
    refuse = _ERROR | errno.EPERM
    looked_into = dict(_numbers(_LOOKED_INTO, column))
    code: list[Instruction] = [
        *((_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)),
        *((_LOAD, 0, 0, _NUMBER), (_GREATER, 0, 1, _LAST_KNOWN)),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        # Its flags lie in memory, where no filter sees them; without it, clone is called.
        *_answer(looked_into["clone3"], _ERROR | errno.ENOSYS),
    ]
    for text, answer in ((_REFUSED, refuse), (_IGNORED, _ERROR)):
        for _, number in _numbers(text, column):
            code += _answer(number, answer)
    for _, number in () if network else _numbers(_SOCKETS, column):
        code += _answer(number, refuse)
    for name, test in _TESTS.items():
        if name in looked_into:
            code += _look_into(looked_into[name], *test)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _numbers(text: str, column: int) -> Iterator[tuple[str, int]]:
    words = iter(text.split())
    for name, *numbers in zip(words, words, words, strict=True):
        if numbers[column] != "-":
            yield name, int(numbers[column])


def _answer(number: int, answer: int) -> Iterable[Instruction]:
    return (_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)


def _look_into(number: int, *test: Instruction) -> Iterable[Instruction]:
    """Refuse a call unless its last test jumps over the refusal."""
    return itertools.chain(
        [(_EQUAL, 0, len(test) + 2, number), *test],
        [(_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ALLOW)],
    )
