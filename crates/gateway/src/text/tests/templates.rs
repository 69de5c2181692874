use serde_json::{Map, Value, json};

use super::{Folder, byte_level_bpe};
use crate::text::{ChatOptions, TextError, TextModel};

fn model(files: &[(&str, &str)]) -> TextModel {
    let tokenizer = byte_level_bpe().to_string();
    let mut all = vec![("tokenizer.json", tokenizer.as_str())];
    all.extend_from_slice(files);
    TextModel::load(Folder::new(&all).path()).unwrap()
}

fn render(template: &str) -> Result<String, TextError> {
    let options = ChatOptions {
        template: Some(template.to_owned()),
        ..ChatOptions::default()
    };
    model(&[]).render_chat(&json!([{"role": "user", "content": "hi"}]), &options)
}

#[test]
fn templates_come_from_their_own_file_first() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let config = (
        "tokenizer_config.json",
        "{\"bos_token\": \"<s>\", \"chat_template\": \"config\"}",
    );
    let text = |files: &[(&str, &str)], options: &ChatOptions| {
        model(files).render_chat(&messages, options).unwrap()
    };
    let plain = ChatOptions::default();
    assert_eq!(text(&[config], &plain), "config");
    assert_eq!(
        text(
            &[config, ("chat_template.jinja", "{{ bos_token }}file")],
            &plain
        ),
        "<s>file"
    );
    let named = (
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}"#,
    );
    assert_eq!(text(&[named], &plain), "D");
    assert_eq!(
        text(
            &[named],
            &ChatOptions {
                tools: Some(json!([])),
                ..plain.clone()
            }
        ),
        "T"
    );
    assert_eq!(
        text(
            &[named],
            &ChatOptions {
                template: Some("tool_use".to_owned()),
                ..plain.clone()
            }
        ),
        "T"
    );
    assert_eq!(
        text(
            &[named],
            &ChatOptions {
                template: Some("{{ 1 }}".to_owned()),
                ..plain
            }
        ),
        "1"
    );
}

#[test]
fn a_model_without_a_template_says_so() {
    let model = model(&[]);
    assert!(!model.has_chat_template());
    let error = model
        .render_chat(&json!([{"role": "user"}]), &ChatOptions::default())
        .unwrap_err();
    assert!(matches!(error, TextError::NoTemplate));
}

#[test]
fn a_broken_template_loads_and_fails_when_it_is_used() {
    let mut model = model(&[("chat_template.jinja", "line\n{% if %}")]);
    assert!(model.has_chat_template());
    let messages = json!([{"role": "user"}]);
    let error = model
        .render_chat(&messages, &ChatOptions::default())
        .unwrap_err();
    assert!(matches!(error, TextError::Template(_)));
    assert!(error.to_string().contains("default:2"), "{error}");
    let error = model.check_templates().unwrap_err();
    assert!(matches!(error, TextError::TemplateSyntax { .. }));
    assert!(error.to_string().contains("default:2"), "{error}");
    assert!(model.replace_templates("{{".to_owned()).is_err());
    model.replace_templates("x".to_owned()).unwrap();
    model.check_templates().unwrap();
    let text = model.render_chat(&messages, &ChatOptions::default());
    assert_eq!(text.unwrap(), "x");
}

#[test]
fn a_refusal_of_the_template_is_told_apart() {
    for template in [
        "{{ raise_exception('roles must alternate') }}",
        "{% macro check() %}{{ raise_exception('roles must alternate') }}{% endmacro %}{{ check() }}",
    ] {
        let error = render(template).unwrap_err();
        assert!(
            matches!(&error, TextError::TemplateRaised(reason) if reason == "roles must alternate"),
            "{error:?}"
        );
    }
}

#[test]
fn a_template_without_end_is_stopped() {
    for template in [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% set x %}{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
        "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    ] {
        let error = render(template).unwrap_err();
        assert!(
            matches!(error, TextError::Template(_)),
            "{template}: {error:?}"
        );
    }
}

#[test]
fn messages_of_the_wrong_shape_are_named() {
    let model = model(&[("chat_template.jinja", "x")]);
    for (messages, part) in [
        (json!([]), "at least one"),
        (json!("hi"), "list"),
        (json!([{}, 3]), "messages[1]"),
    ] {
        let error = model
            .render_chat(&messages, &ChatOptions::default())
            .unwrap_err();
        assert!(matches!(error, TextError::Messages(_)));
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn the_final_message_is_left_open() {
    let model = model(&[(
        "chat_template.jinja",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}",
    )]);
    let options = ChatOptions {
        continue_final_message: true,
        ..ChatOptions::default()
    };
    let messages =
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]);
    assert_eq!(
        model.render_chat(&messages, &options).unwrap(),
        "<user>a</>\n<assistant>b c"
    );
    let both = ChatOptions {
        add_generation_prompt: true,
        ..options
    };
    assert!(matches!(
        model.render_chat(&messages, &both),
        Err(TextError::Messages(_))
    ));
}

#[test]
fn variables_reach_the_template() {
    let kwargs: Map<String, Value> = [("enable_thinking".to_owned(), json!(false))]
        .into_iter()
        .collect();
    let options = ChatOptions {
        template: Some("{{ enable_thinking }} {{ tools is none }} {{ messages[0] }}".to_owned()),
        kwargs,
        ..ChatOptions::default()
    };
    let text = model(&[])
        .render_chat(
            &json!([{"role": "user", "content": null, "n": 1.5}]),
            &options,
        )
        .unwrap();
    assert_eq!(text, "False True {'role': 'user', 'n': 1.5}");
}
