"""Compile DeepSpeed's CPU communication extension, which else the first training run waits for.

DeepSpeed compiles it with g++ and ninja, in about a minute, when a process group starts on CPUs and
TORCH_EXTENSIONS_DIR holds no compiled copy. Here it is asked for by the name that DeepSpeed itself
uses, for the CPU also on a machine with GPUs. Declined: starting a process group, which compiles
the same thing and needs a port.
"""

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


def main() -> None:
    """Compile and load the extension, or raise what the compiler said."""
    builder = CPU_Accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        print("this machine has no use for the extension")
        return
    builder.load(verbose=True)


if __name__ == "__main__":
    main()
