"""Checks of the configuration, the machine and local files for what keeps a run from working, by
area, before Ray starts.

- :mod:`.recipe`: settings of verl's and the switch's, alone and together
- :mod:`.arms`: what an arm cannot do, and what it needs installed
- :mod:`.data`: the data files against batch size and steps
- :mod:`.prompts`: the prompts against the model's tokenizer or processor
- :mod:`.resources`: CPUs, GPUs and folders against what verl reserves
- :mod:`.plugins`: installed versions, and whether verl and vLLM load QeRL
- :mod:`.models`: model folders on this machine, and the settings that have to fit them
- :mod:`.tokenizers`: their tokenizers
- :mod:`.resume`: the checkpoint that a run resumes from

A check returns problems: one sentence each, which begins with the setting and ends with the fix.
Nothing here starts, downloads or writes anything.
"""
