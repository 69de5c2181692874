"""Other servers, each in an environment of its own, to be measured beside ScaleLLM."""
