"""Scenes of real and recorded sound: voices, instruments, sounds and texts from packages.

Each source is a plug-in that works where its package is installed (`source.sources`). Which of
their speakers, files and sentences only tests may use is in `held_out`.
"""
