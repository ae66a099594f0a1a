from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from flowmesh_core.errors import CrashError, ExecutionError
from flowmesh_core.places.crash import OomKills, explain_exit, is_out_of_memory
from flowmesh_core.places.memory import Watch

GIB = 1 << 30
WHAT = "executor 'vllm'"


def watched(last_bytes: int, limit_bytes: int | None = None, *, exceeded: bool = False) -> Watch:
    return Watch(
        root_pid=1,
        limit_bytes=limit_bytes,
        last_bytes=last_bytes,
        peak_bytes=last_bytes,
        exceeded=exceeded,
        on_exceeded=lambda _: None,
        forget=lambda _: False,
        pids=set(),
    )


# Core files would cost seconds and space.
PROLOGUE = """
import ctypes, os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""


def run_and_explain(code: str) -> CrashError:
    """Explain the end of a real process as a place would."""
    program = [sys.executable, "-c", PROLOGUE + code]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    number = -done.returncode if done.returncode < 0 else None
    return explain_exit(
        what=WHAT,
        code=None if number else done.returncode,
        signal=signal.Signals(number).name if number else None,
        output_tail=done.stderr,
    )


RAISE = "signal.signal(signal.{0}, signal.SIG_DFL); os.kill(os.getpid(), signal.{0})"


@pytest.mark.parametrize(
    ("name", "words", "retriable"),
    [
        ("SIGSEGV", "segmentation fault", True),
        ("SIGABRT", "aborted", True),
        ("SIGBUS", "bus error", True),
        ("SIGTERM", "terminated", True),
        ("SIGILL", "illegal instruction", False),
        ("SIGFPE", "floating point exception", False),
        ("SIGXFSZ", "file size limit exceeded", False),
    ],
)
def test_a_signal_is_named_in_words(name: str, words: str, retriable: bool) -> None:
    error = run_and_explain(RAISE.format(name))
    assert str(error) == f"{WHAT} was ended by {name} ({words})"
    assert (error.signal, error.exit_code, error.oom) == (name, None, False)
    assert (error.code, error.retriable) == ("crash", retriable)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ctypes.string_at(0)", "SIGSEGV (segmentation fault)"),
        ("os.abort()", "SIGABRT (aborted)"),
        ("os.kill(os.getpid(), 9)", "SIGKILL (killed), cause unknown"),
        (
            "import faulthandler; faulthandler.enable(); ctypes.string_at(0)",
            "SIGSEGV (segmentation fault): Fatal Python error: Segmentation fault",
        ),
    ],
)
def test_a_crash_is_told_from_how_it_ended(code: str, words: str) -> None:
    error = run_and_explain(code)
    assert str(error) == f"{WHAT} was ended by {words}"
    assert (error.oom, error.retriable) == (False, True)


@pytest.mark.parametrize("code", ["os._exit(3)", "sys.exit(3)"])
def test_an_exit_code_is_named_and_may_pass(code: str) -> None:
    error = run_and_explain(code)
    assert str(error) == f"{WHAT} ended with exit code 3"
    assert (error.signal, error.exit_code, error.oom, error.retriable) == (None, 3, False, True)


def test_a_process_that_took_itself_as_done_is_not_tried_again() -> None:
    error = run_and_explain("os._exit(0)")
    assert str(error) == f"{WHAT} ended without an answer"
    assert (error.exit_code, error.retriable) == (0, False)


def test_a_signal_without_a_name_of_its_own_is_passed_on() -> None:
    assert str(explain_exit(what=WHAT, signal="SIG40")) == f"{WHAT} was ended by SIG40"


def test_the_line_that_says_why_is_in_the_message() -> None:
    error = run_and_explain(
        "print('loading', file=sys.stderr)\n"
        "try:\n    raise ValueError('\\x1b[31mno such device\\x1b[0m')\n"
        "except ValueError:\n    import traceback; traceback.print_exc()\n"
        "print('bye', file=sys.stderr)\nos._exit(4)"
    )
    assert str(error) == f"{WHAT} ended with exit code 4: ValueError: no such device"


def test_output_that_says_nothing_is_left_out() -> None:
    error = run_and_explain("print('loaded 32 layers', file=sys.stderr); os._exit(1)")
    assert str(error) == f"{WHAT} ended with exit code 1"


def test_long_last_words_are_cut() -> None:
    error = explain_exit(what=WHAT, code=1, output_tail="fatal: " + "x" * 1000)
    words = str(error).partition("exit code 1: ")[2]
    assert len(words) == 300
    assert words.startswith("fatal: xxx")
    assert words.endswith("x…")


def test_memory_that_the_system_refuses_is_told_by_the_last_words() -> None:
    error = run_and_explain(
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); bytearray(1 << 30)"
    )
    assert str(error) == (
        f"{WHAT} ended with exit code 1, out of memory: its output says so: MemoryError"
    )
    assert (error.code, error.oom, error.retriable) == ("crash.out_of_memory", True, True)


def test_an_abort_for_want_of_memory_is_no_plain_abort() -> None:
    tail = (
        "terminate called after throwing an instance of 'std::bad_alloc'\n"
        "  what():  std::bad_alloc\nAborted (core dumped)\n"
    )
    error = explain_exit(what=WHAT, signal="SIGABRT", output_tail=tail)
    assert error.oom
    assert str(error).endswith("out of memory: its output says so: what():  std::bad_alloc")


@pytest.mark.parametrize(("code", "signal"), [(0, None), (None, "SIGFPE")])
def test_memory_may_suffice_next_time_however_it_ended(
    code: int | None, signal: str | None
) -> None:
    error = explain_exit(what=WHAT, code=code, signal=signal, output_tail="MemoryError")
    assert (error.oom, error.retriable) == (True, True)


def test_over_its_own_limit_it_is_not_tried_again_and_told_what_to_raise() -> None:
    watch = watched(3 * GIB, 2 * GIB, exceeded=True)
    error = explain_exit(
        what=WHAT,
        signal="SIGKILL",
        watch=watch,
        oom_kills=1,
        machine_limit_bytes=3 * GIB,
        output_tail="CUDA out of memory.",
    )
    assert str(error).startswith(
        f"{WHAT} was ended by SIGKILL (killed), out of memory: 3.00 GiB in use, 2.00 GiB allowed; "
        "raise spec.resources.hardware.memory"
    )
    assert (error.oom, error.retriable) == (True, False)


@pytest.mark.parametrize(("code", "signal"), [(None, "SIGKILL"), (1, None)])
def test_kills_that_the_kernel_counted_are_the_cause(code: int | None, signal: str | None) -> None:
    error = explain_exit(what=WHAT, code=code, signal=signal, oom_kills=2)
    assert str(error).endswith("out of memory: the kernel killed 2 in its control group meanwhile")
    assert (error.oom, error.retriable) == (True, True)


@pytest.mark.parametrize(("code", "signal"), [(None, "SIGSEGV"), (0, None)])
def test_kills_do_not_explain_an_end_of_another_kind(code: int | None, signal: str | None) -> None:
    assert not explain_exit(what=WHAT, code=code, signal=signal, oom_kills=2).oom


@pytest.mark.parametrize(
    ("last", "limit", "machine", "oom"),
    [
        (96, 100, None, True),
        (95, 100, None, False),
        (96, None, 100, True),
        (96, 100, 200, True),
        (96, 200, 100, True),
        (96, 200, 200, False),
        (96, None, None, False),
    ],
)
def test_killed_while_nearly_all_memory_was_used_is_out_of_memory(
    last: int, limit: int | None, machine: int | None, oom: bool
) -> None:
    watch = watched(last * GIB, None if limit is None else limit * GIB)
    bound = None if machine is None else machine * GIB
    error = explain_exit(what=WHAT, signal="SIGKILL", watch=watch, machine_limit_bytes=bound)
    assert (error.oom, error.retriable) == (oom, True)
    end = "out of memory: 96.00 GiB of 100.00 GiB in use when last measured"
    assert str(error).endswith(end if oom else "cause unknown")
    # Whoever uses that much and crashes for another reason has still crashed.
    crash = explain_exit(what=WHAT, signal="SIGSEGV", watch=watch, machine_limit_bytes=bound)
    assert not crash.oom


def test_kills_are_counted_from_the_beginning() -> None:
    kills = OomKills(iter([5, 5, 7, None]).__next__)
    assert (kills.since(), kills.since(), kills.since()) == (0, 2, 0)
    assert OomKills(lambda: None).since() == 0


OUT_OF_MEMORY = [
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.22 GiB. GPU 0 has a total",
    "RuntimeError: CUDA out of memory. Tried to allocate 92.00 MiB (GPU 0; 1.96 GiB total",
    "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be reported later",
    "RuntimeError: CUDA driver error: out of memory",
    "RuntimeError: cuda runtime error (2) : out of memory at /pytorch/aten/THCStorage.cu:58",
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 3.31 GiB.",
    "HIP error: out of memory",
    "RuntimeError: MPS backend out of memory (MPS allocated: 16.0 GB, max allowed: 18.1 GB).",
    "XPU out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "rocBLAS error: rocblas_status_memory_error",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "node7:315:371 [3] include/alloc.h:125 NCCL WARN Cuda failure 2 'out of memory'",
    "enqueue.cc:43 NCCL WARN Cuda failure 'out of memory'",
    "thrust::system::system_error: cudaErrorMemoryAllocation: out of memory",
    "hipErrorOutOfMemory",
    "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests.",
    "ValueError: No available memory for the cache blocks. Try increasing it",
    "ValueError: Free memory on device (31.44/47.38 GiB) on startup is less than desired GPU "
    "memory utilization (0.95, 45.01 GiB).",
    "Free memory on device cuda:0 (19.77/22.05 GiB) on startup is less than desired GPU memory",
    "10.0 GiB KV cache is needed, which is larger than the available KV cache memory (4.1 GiB).",
    "seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache",
    "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9866.00 MiB on device 1: "
    "cudaMalloc failed: out of memory",
    "alloc_tensor_range: failed to allocate CUDA0 buffer of size 151851674624",
    "llama_model_load: error loading model: unable to allocate backend buffer",
    "llama_init_from_model: failed to initialize: failed to allocate compute pp buffers",
    "llama_kv_cache_init: failed to allocate buffer for kv cache",
    "ggml_aligned_malloc: insufficient memory (attempted to allocate 4096.00 MB)",
    "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
    "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7406166528 bytes.",
    "RESOURCE_EXHAUSTED: Out of memory allocating 20029400304 bytes.",
    "RuntimeError: Resource exhausted: Out of memory while trying to allocate 24 bytes.",
    "RESOURCE_EXHAUSTED: Failed to allocate request for 1.00GiB (1073741824B) on device ordinal 0",
    "failed to alloc 2147483648 bytes on host: CUDA_ERROR_OUT_OF_MEMORY",
    "ResourceExhaustedError: OOM when allocating tensor with shape[64,1024]",
    "MemoryError",
    'Traceback (most recent call last):\n  File "x.py", line 1\nMemoryError\n',
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB for an array",
    "numpy: Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory: you tried",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 5077901088 bytes.",
    "unable to mmap 1024 bytes from file </torch_1>: Cannot allocate memory (12)",
    "bash: fork: Cannot allocate memory",
    "memory allocation of 4294967296 bytes failed",
    "fatal error: runtime: out of memory",
    "java.lang.OutOfMemoryError: Java heap space",
]

OTHER = [
    "",
    "The memory of the model is large",
    "No error was found and the program never ran out of memory.",
    "If you encounter CUDA out of memory, try to set --tile with a smaller number.",
    "Set expandable_segments:True to avoid CUDA out of memory errors",
    "libgomp.so.1: cannot allocate memory in static TLS block",
    "grpc: RESOURCE_EXHAUSTED: Received message larger than max (5000000 vs. 4194304)",
    "RESOURCE_EXHAUSTED: Quota exceeded for requests per minute",
    "triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 180224",
    "DataLoader worker is killed by signal: Bus error. workers are out of shared memory.",
    "OSError: [Errno 28] No space left on device",
    "ggml_vulkan: Failed to allocate pinned memory.",
    "ggml_cuda_host_malloc: failed to allocate 1900,00 MiB of pinned memory: invalid argument",
    "torch.cuda.memory_allocated: 4.1 GiB; torch.cuda.max_memory_reserved: 5 GiB",
    "CUDA error: an illegal memory access was encountered",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "InMemoryErrorLog opened",
    "the room has a good memory, allocated to nobody",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_texts_of_libraries_that_ran_out_of_memory_are_known(text: str) -> None:
    assert is_out_of_memory(text)
    assert is_out_of_memory(f"loading\n[rank0]: {text}\nbye")
    assert is_out_of_memory(ExecutionError(f"RuntimeError: {text}"))


@pytest.mark.parametrize("text", OTHER)
def test_texts_that_merely_speak_of_memory_are_not(text: str) -> None:
    assert not is_out_of_memory(text)
    assert not is_out_of_memory(RuntimeError(text))


def chained(cause: BaseException) -> BaseException:
    error = RuntimeError("the engine could not be started")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (type("Starved", (MemoryError,), {})(), True),
        (OSError(errno.ENOMEM, "x"), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("no text"), True),
        (chained(chained(MemoryError())), True),
        (ExecutionError("the executor tried to end the process: MemoryError()"), True),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (chained(ValueError("x")), False),
    ],
    ids=repr,
)
def test_exceptions_say_it_by_type_number_text_or_cause(error: BaseException, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


def test_a_long_output_is_read_in_little_time() -> None:
    text = ("cuda error failed " * 100 + "\n" + "x." * 2000 + "\n") * 12
    started = time.process_time()
    assert not is_out_of_memory(text)
    assert time.process_time() - started < 1
