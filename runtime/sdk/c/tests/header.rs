//! The header is written by hand: it must say what the library exports, with the same types.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use support::{Sdk, package, said};

/// Types of results and arguments, as C writes them.
type Signatures = BTreeMap<String, Vec<String>>;

/// Prototypes of the header: `TYPE ws_name(TYPE name, …);`.
fn of_header() -> Signatures {
    let text = fs::read_to_string(package().join("include/warmswap.h")).unwrap();
    let mut rest = text.as_str();
    let mut code = String::new();
    while let Some((before, comment)) = rest.split_once("/*") {
        code.push_str(before);
        rest = comment.split_once("*/").expect("a comment without an end").1;
    }
    code.push_str(rest);
    let lines = code.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join(" ");
    let statements = lines.split(';').map(str::trim).filter(|line| line.contains('(') && !line.starts_with("typedef"));
    statements
        .map(|statement| {
            let (head, arguments) = statement.split_once('(').unwrap();
            let (result, name) = split_name(head);
            let arguments = arguments.trim_end_matches(')').split(',').map(str::trim).filter(|text| *text != "void");
            let types = arguments.map(|argument| split_name(argument).0);
            (name, [result].into_iter().chain(types).collect())
        })
        .collect()
}

/// `const char *name` → (`const char *`, `name`).
fn split_name(text: &str) -> (String, String) {
    let at = text.rfind(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap() + 1;
    (text[..at].split_whitespace().collect::<Vec<_>>().join(" "), text[at..].to_owned())
}

/// Functions of the sources: `extern "C" fn ws_name(name: Type, …) -> Type {`.
fn of_library() -> Signatures {
    let mut signatures = Signatures::new();
    for entry in fs::read_dir(package().join("src")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        for exported in text.split("#[unsafe(no_mangle)]").skip(1) {
            let (_, declaration) = exported.split_once("extern \"C\" fn ").unwrap();
            let (name, rest) = declaration.split_once('(').unwrap();
            let (arguments, rest) = rest.split_once(") -> ").unwrap();
            let result = rest.split_once(" {").unwrap().0;
            let arguments = arguments.split(',').map(str::trim).filter(|text| !text.is_empty());
            let types = arguments.map(|argument| in_c(argument.split_once(": ").unwrap().1));
            signatures.insert(name.to_owned(), [in_c(result)].into_iter().chain(types).collect());
        }
    }
    signatures
}

fn in_c(rust: &str) -> String {
    let to = |inner: &str, before: &str| {
        let inner = in_c(inner);
        // Pointers to constant pointers need no word for the inner one.
        if inner.ends_with('*') { format!("{inner}*") } else { format!("{before}{inner} *") }
    };
    if let Some(inner) = rust.strip_prefix("*const ") {
        return to(inner, "const ");
    }
    if let Some(inner) = rust.strip_prefix("*mut ") {
        return to(inner, "");
    }
    let known = match rust {
        "c_int" => "int",
        "c_char" => "char",
        "c_void" => "void",
        "i64" => "int64_t",
        "u32" => "uint32_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "Option<Visit>" => "ws_visit",
        "Option<VisitCounter>" => "ws_visit_counter",
        "ws_service" | "ws_event" | "ws_stats" | "ws_place" => rust,
        other => panic!("no type of C is known for {other}"),
    };
    known.to_owned()
}

#[test]
fn the_header_declares_what_the_library_exports_with_the_same_types() {
    let (header, library) = (of_header(), of_library());
    assert!(header.len() > 40, "{header:?}");
    assert_eq!(header, library);

    let sdk = Sdk::install();
    let symbols = said(Command::new("nm").args(["-D", "--defined-only"]).arg(sdk.path("lib/libwarmswap.so")));
    let names = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).map(str::to_owned);
    assert_eq!(names.collect::<BTreeSet<_>>(), header.into_keys().collect());
}

#[test]
fn every_function_links_from_strict_c_and_from_cpp_shared_and_static() {
    let sdk = Sdk::install();
    let names: Vec<String> = of_header().into_keys().collect();
    // As data, so that nothing is optimised away.
    let list: String = names.iter().map(|name| format!("    (void (*)(void)){name},\n")).collect();
    let program = format!(
        "#include <warmswap.h>\n#include <stdio.h>\n#include <string.h>\n\
         void (*functions[])(void) = {{\n{list}}};\n\
         int main(void) {{\n    printf(\"%s\\n\", ws_version());\n    return strcmp(ws_version(), WS_VERSION);\n}}\n"
    );
    for (compiler, file, standard) in
        [("cc", "all.c", "-std=c99"), ("c++", "all.cpp", "-std=c++11"), ("cc", "all.c", "-std=c17")]
    {
        fs::write(sdk.path(file), &program).unwrap();
        let strict = [standard, "-pedantic", "-Wall", "-Wextra", "-Werror", "-o"];
        let mut shared = Command::new(compiler);
        shared.args(strict).arg(sdk.path("shared")).arg(sdk.path(file));
        said(shared.args(sdk.flags(&["--cflags", "--libs"])));
        let mut run = Command::new(sdk.path("shared"));
        assert_eq!(said(run.env("LD_LIBRARY_PATH", sdk.path("lib"))).trim(), env!("CARGO_PKG_VERSION"));

        let mut alone = Command::new(compiler);
        alone.args(strict).arg(sdk.path("static")).arg(sdk.path(file)).arg(sdk.path("lib/libwarmswap.a"));
        let flags = sdk.flags(&["--cflags", "--libs", "--static"]);
        said(alone.args(flags.iter().filter(|flag| *flag != "-lwarmswap")));
        assert_eq!(said(&mut Command::new(sdk.path("static"))).trim(), env!("CARGO_PKG_VERSION"));
    }
    assert_eq!(sdk.flags(&["--modversion"]), [env!("CARGO_PKG_VERSION")]);
}
