"""Ray without reinforcement learning: sessions, placement, waits, signals, traces and the watchdog."""
