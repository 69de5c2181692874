"""The process tree of `scalellm serve`.

root (supervisor.py)        mechanism: spawns, reaps, signals, drains; small, imports little
|-- watchdog (watchdog.py)  outlives the root for a moment, to end whatever is left
|-- gateway                 `scalellm gateway`
|-- controller (process.py) decides what should run (policy.py); may crash alone
`-- engine-0 ...            `scalellm engine`
"""
