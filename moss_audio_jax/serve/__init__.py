"""HTTP in OpenAI's form: chat about sound, transcriptions. docs/serve.md says what is spoken."""
