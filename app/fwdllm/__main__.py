"""``python -m fwdllm`` is the ``fwdllm`` command."""

from fwdllm.cli.commands import main

main()
