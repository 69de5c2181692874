"""Which shape the deployment should have: a few wide replicas, or many narrow ones.

reading.py   what a gateway says at one moment     cost.py     what a step costs on each shape
measured.py  several readings make signals         policy.py   stay or switch: a pure function
signals.py   what is measured of the load          journal.py  every decision with its inputs
predict.py   what a blueprint would make of it     shape.py    the blueprints there are

Nothing here knows processes, sockets or clocks; the simulator and the controller run the same code.
"""
