"""What bench_switching.py and bench_simulator.py share: real deployments of two device slots."""
