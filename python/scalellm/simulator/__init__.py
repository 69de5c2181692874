"""A deployment in simulated time: what a blueprint, a policy or a load would do on real devices.

cli -> simulator -> controller.blueprint (the policy), engine (the scheduler), bench (the loads)

requests.py   whose arrival makes whose: rates, closed loops, days        (bench)
cluster.py    the gateway's part: routing, its queue, switches            (crates/routing)
metrics.py    what the gateway would count, for the policy          (controller/blueprint)
replica.py    the engine loop's part: a clock instead of a worker         (engine/scheduler.py)
stretch.py    many equal steps in closed form
step_time.py  the calibrated cost where the engine has its learnt one     (controller/blueprint)
"""
