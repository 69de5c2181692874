"""What `benchmarks/gpu.sh` measures where there is a GPU.

timing    how long work on the device takes, and the device's ceilings
kernels   experts, attention and products beside the bandwidth measured with them
prefill   prompts' attention by Triton's kernel beside FlashInfer's
steps     whole decode steps of the engine, and how many experts they read
serving   TTFT and TBT through the gateway
shapes    replicas that share GPUs, side by side and from one shape to another
parts     each of these in a process and within a time of its own
peer      transformers' continuous batching, in this process
tiles     what to try when tuning, and the file of the best
summary   all of it as Markdown
"""
