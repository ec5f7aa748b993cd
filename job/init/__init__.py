"""The command `init`: looks at the text and the machine that are there, and writes settings that fit."""
