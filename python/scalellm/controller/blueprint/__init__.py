"""Which shape the deployment should have: a few wide replicas, or many narrow ones.

signals.py  what is measured of the load          cost.py      what a step costs on each shape
predict.py  what a blueprint would make of it     policy.py    stay or switch: a pure function
shape.py    the blueprints there are              journal.py   every decision with its inputs

Nothing here knows processes, sockets or clocks; the simulator and the controller run the same code.
"""
