"""Many prompts through a server, into a log of traces and a file of responses; a crash loses none and doubles none."""
