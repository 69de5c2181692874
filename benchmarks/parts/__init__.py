"""Parts of an endpoint as they are usually built, to be measured in the place of ScaleLLM's."""
