"""Bridges to other tools, one package or module per tool. A tool is imported when its bridge is asked for."""
