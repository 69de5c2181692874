//! Chat templates: messages to a prompt, as transformers' `apply_chat_template` renders them.
//!
//! Templates come from the model's folder or the gateway's configuration. One that loops for ever or prints without
//! end is stopped by its limits; they are no sandbox against a template that is made to use up memory, so a
//! client's own template should be accepted only from trusted clients.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Template};
use serde_json::{Map, Value};

use super::error::TextError;

use super::python;
use super::rewrite::rewrite;
use super::values::{str_of, to_template};

/// Instructions that one rendering may take; about a second of work.
const MAX_INSTRUCTIONS: u64 = 20_000_000;
/// Bytes that one rendering may print, captured text included.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Depth of nested macros.
const MAX_RECURSION: usize = 100;
/// The names under which a message's reasoning comes; templates read the first, or `thinking`.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Stands after the final message's text, where the prompt is cut to continue it.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// How a conversation is rendered.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to continue.
    pub continue_final_message: bool,
    /// A template, or the name of one of the model's templates; `None` is the model's default.
    pub template: Option<String>,
    /// JSON schemas of the tools.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub kwargs: Map<String, Value>,
}

/// A model's chat templates, compiled.
pub(super) struct ChatTemplates {
    environment: Environment<'static>,
    /// Name, source, and why it does not compile.
    templates: Vec<(String, String, Option<String>)>,
    special_tokens: Map<String, Value>,
}

impl ChatTemplates {
    /// Compile `templates`, (name, source); one that fails is reported by [`Self::check`], and when it is used.
    pub(super) fn new(
        templates: Vec<(String, String)>,
        special_tokens: Map<String, Value>,
    ) -> Self {
        let mut environment = environment();
        let templates = templates
            .into_iter()
            .map(|(name, source)| {
                let compiled = environment.add_template_owned(name.clone(), rewrite(&source));
                (name, source, compiled.err().map(|error| describe(&error)))
            })
            .collect();
        Self {
            environment,
            templates,
            special_tokens,
        }
    }

    /// Errors: [`TextError::TemplateSyntax`] for the first template that does not compile.
    pub(super) fn check(&self) -> Result<(), TextError> {
        let broken = |(name, _, error): &(String, String, Option<String>)| {
            error.as_ref().map(|reason| TextError::TemplateSyntax {
                name: name.clone(),
                reason: reason.clone(),
            })
        };
        self.templates.iter().find_map(broken).map_or(Ok(()), Err)
    }

    /// These templates' special tokens with `source` as the only template.
    pub(super) fn replaced(&self, source: String) -> Result<Self, TextError> {
        let only = Self::new(
            vec![("default".to_owned(), source)],
            self.special_tokens.clone(),
        );
        only.check().map(|()| only)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.templates.is_empty()
    }

    /// The prompt for `messages`.
    pub(super) fn render(
        &self,
        messages: &Value,
        options: &ChatOptions,
    ) -> Result<String, TextError> {
        let messages = plain_messages(messages)?;
        let Some(given) = options
            .template
            .as_deref()
            .filter(|given| self.find(given).is_none())
        else {
            let (name, source) = self.select(options)?;
            let template = self
                .environment
                .get_template(name)
                .map_err(|e| failure(&e))?;
            return self.render_with(&template, source, messages, options);
        };
        let mut environment = self.environment.clone();
        environment
            .add_template_owned("chat_template", rewrite(given))
            .map_err(|e| failure(&e))?;
        let template = environment
            .get_template("chat_template")
            .map_err(|e| failure(&e))?;
        self.render_with(&template, given, messages, options)
    }

    fn find(&self, name: &str) -> Option<&(String, String, Option<String>)> {
        self.templates.iter().find(|(known, ..)| known == name)
    }

    /// Name and source of the model's template that `options` ask for.
    fn select(&self, options: &ChatOptions) -> Result<(&str, &str), TextError> {
        let chosen = match &options.template {
            Some(name) => self.find(name),
            None => options
                .tools
                .as_ref()
                .and_then(|_| self.find("tool_use"))
                .or_else(|| self.find("default")),
        };
        match chosen {
            Some((name, source, None)) => Ok((name, source)),
            Some((_, _, Some(error))) => Err(TextError::Template(error.clone())),
            None if self.templates.is_empty() => Err(TextError::NoTemplate),
            None => {
                let names: Vec<&str> = self
                    .templates
                    .iter()
                    .map(|(name, ..)| name.as_str())
                    .collect();
                Err(TextError::Messages(format!(
                    "the model has no default chat template; name one of: {}",
                    names.join(", ")
                )))
            }
        }
    }

    fn render_with(
        &self,
        template: &Template<'_, '_>,
        source: &str,
        mut messages: Vec<Map<String, Value>>,
        options: &ChatOptions,
    ) -> Result<String, TextError> {
        let text = match (
            options.continue_final_message,
            options.add_generation_prompt,
        ) {
            (true, true) => {
                let reason = "continue_final_message and add_generation_prompt exclude each other";
                return Err(TextError::Messages(reason.to_owned()));
            }
            (true, false) => Some(mark_final_message(&mut messages, source)?),
            (false, _) => None,
        };
        let mut variables = self.special_tokens.clone();
        for (name, value) in &options.kwargs {
            variables.insert(name.clone(), value.clone());
        }
        variables.insert(
            "messages".to_owned(),
            messages.into_iter().map(Value::Object).collect(),
        );
        if let Some(tools) = &options.tools {
            variables.insert("tools".to_owned(), tools.clone());
        }
        variables.entry("tools").or_insert(Value::Null);
        variables.entry("documents").or_insert(Value::Null);
        variables.insert(
            "add_generation_prompt".to_owned(),
            options.add_generation_prompt.into(),
        );

        let mut output = Bounded::default();
        template
            .render_captured_to(to_template(&Value::Object(variables)), &mut output)
            .map_err(|error| failure(&error))?;
        let prompt = String::from_utf8(output.bytes)
            .map_err(|error| TextError::Template(error.to_string()))?;
        match text {
            Some(text) => cut_at_mark(prompt, &text),
            None => Ok(prompt),
        }
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    match SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
    {
        Ok(syntax) => environment.set_syntax(syntax),
        Err(error) => unreachable!("delimiters are the defaults: {error}"),
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(false);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_formatter(|output, state, value| {
        let written;
        let text = match value.as_str() {
            Some(text) => text,
            None => {
                written = str_of(value);
                &written
            }
        };
        let printed = state.get_or_insert_extension(Printed(0));
        printed.0 = printed.0.saturating_add(text.len());
        if printed.0 > MAX_OUTPUT_BYTES {
            return Err(too_much_output());
        }
        output.write_str(text).map_err(Error::from)
    });
    python::install(&mut environment);
    environment
}

/// Bytes that a rendering has printed so far, in captures too.
struct Printed(usize);

/// The rendered text, up to its limit.
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(too_much_output()));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn too_much_output() -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("it printed more than {MAX_OUTPUT_BYTES} bytes"),
    )
}

/// The messages as objects, as transformers prepares them: without null fields, reasoning under its standard name.
fn plain_messages(messages: &Value) -> Result<Vec<Map<String, Value>>, TextError> {
    let Some(list) = messages.as_array().filter(|list| !list.is_empty()) else {
        return Err(TextError::Messages(
            "messages must be a list of at least one message".to_owned(),
        ));
    };
    list.iter()
        .enumerate()
        .map(|(index, message)| {
            let object = message.as_object().ok_or_else(|| {
                TextError::Messages(format!(
                    "messages[{index}] must be an object with a role and content"
                ))
            })?;
            let mut plain: Map<String, Value> = object
                .iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            if let Some(reasoning) = REASONING_FIELDS
                .iter()
                .find_map(|field| plain.get(*field))
                .cloned()
            {
                let mut aliased = Map::new();
                aliased.insert("thinking".to_owned(), reasoning.clone());
                aliased.append(&mut plain);
                aliased.insert("reasoning_content".to_owned(), reasoning);
                plain = aliased;
            }
            Ok(plain)
        })
        .collect()
}

/// Put the mark behind the final message's text, and return that text.
fn mark_final_message(
    messages: &mut [Map<String, Value>],
    source: &str,
) -> Result<String, TextError> {
    let refused = |reason: &str| TextError::Messages(format!("continue_final_message: {reason}"));
    if !source.contains("content") {
        return Err(refused(
            "the chat template does not print a message's content",
        ));
    }
    let content = messages
        .last_mut()
        .and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => {
            parts
                .iter_mut()
                .rev()
                .find_map(|part| match part.get_mut("text") {
                    Some(Value::String(text)) => Some(text),
                    _ => None,
                })
        }
        _ => None,
    };
    let text = text.ok_or_else(|| refused("the final message has no text to continue"))?;
    let whole = text.clone();
    text.push_str(CONTINUE_MARK);
    Ok(whole)
}

/// The prompt up to the mark; where the template trimmed the message, up to its last character.
fn cut_at_mark(mut prompt: String, text: &str) -> Result<String, TextError> {
    let found = prompt
        .rfind(CONTINUE_MARK.trim_end())
        .filter(|_| prompt.contains(text.trim()));
    let Some(at) = found else {
        let reason =
            "continue_final_message: the chat template leaves out the final message, or changes it";
        return Err(TextError::Messages(reason.to_owned()));
    };
    let kept = prompt[at..].starts_with(CONTINUE_MARK);
    prompt.truncate(at);
    if !kept {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}

fn failure(error: &Error) -> TextError {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if cause.is::<python::Raised>() {
            return TextError::TemplateRaised(
                error.detail().unwrap_or("no reason given").to_owned(),
            );
        }
        source = cause.source();
    }
    TextError::Template(describe(error))
}

/// What happened, and where in the template.
fn describe(error: &Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("it did not end within {MAX_INSTRUCTIONS} steps");
    }
    error.to_string()
}
