"""Other servers and gateways, each in an environment of its own, measured beside ScaleLLM.

    system          what a system is; starting it, waiting until it is ready, ending it
    environment     a Python environment of exactly the versions in pins/NAME.txt
    weights         the same random weights for all, as the checkpoints that peers load
    process_tree    processor time and memory of all processes of a server
    measure         one level of load, by `scalellm bench serve`
    run, record     all systems in turns; what was measured so far
    tables          Markdown

    scalellm_serve, openvino, llama_cpp, vllm, transformers_serve      systems(shape)
    nginx, smg, litellm, gateway (ScaleLLM's, and the backends)        for bench_gateway.py

A peer is a module that says how to build it and how to start it, and no more. A new one is listed
in bench_peers.py. Its pins are what `pip freeze --all` says, without pip, where it was first
installed and ran.
"""
