"""SGLang's `/generate` dialect, at a prefix of its own."""
