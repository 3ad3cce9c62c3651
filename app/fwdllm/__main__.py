"""``python -m fwdllm`` is the ``fwdllm`` command."""

from fwdllm.cli import main

main()
