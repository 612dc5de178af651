//! There are no import cycles between the files of a crate: they can be read in an order in which
//! each file imports only files that were read before.
//!
//! A file imports another one by `use`, by a path that begins with `crate::` or `super::`, or by
//! `mod`. An item that a `mod.rs` or a root defines or re-exports is imported from that file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The lines of each file of a crate, by its path below the folder of its root.
type Files = BTreeMap<String, Vec<String>>;

/// The libraries and the programs.
const CRATES: [&str; 5] = [
    "rpc-common/src",
    "rpc-client/src",
    "rpc-client/src/bin/rpc-client",
    "rpc-server/src",
    "rpc-server/src/bin/rpc-server",
];

#[test]
fn no_crate_has_an_import_cycle() {
    for folder in CRATES {
        let mut files = Files::new();
        let src = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(folder);
        read_files(&src, "", &mut files);
        let cycle = find_cycle(&imports_of_all(&files)).join(" -> ");
        assert_eq!(cycle, "", "{folder}");
    }
}

/// Reads the code of all files below a folder: without comments, and up to the unit tests, which
/// are last in a file.
fn read_files(folder: &Path, prefix: &str, files: &mut Files) {
    for entry in fs::read_dir(folder).expect("the folder exists").flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if name == "bin" {
            continue; // the programs are crates of their own
        }
        if entry.path().is_dir() {
            read_files(&entry.path(), &format!("{name}/"), files);
        } else {
            let text = fs::read_to_string(entry.path()).expect("a source file is UTF-8");
            files.insert(name, code(&text));
        }
    }
}

fn code(text: &str) -> Vec<String> {
    let lines = text
        .lines()
        .take_while(|line| line.trim() != "#[cfg(test)]");
    let without_comment = |line: &str| {
        line.split("//")
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    lines.map(without_comment).collect()
}

/// The imports of each file, by its path.
fn imports_of_all(files: &Files) -> BTreeMap<String, BTreeSet<String>> {
    let imports_of = |file: &String| (file.clone(), imports(files, file));
    let graph: BTreeMap<_, _> = files.keys().map(imports_of).collect();
    for file in files.keys().filter(|file| !is_root(file)) {
        // Otherwise this test does not understand how the file belongs to the crate.
        let is_imported = graph.values().any(|imports| imports.contains(file));
        assert!(is_imported, "nothing imports {file}");
    }
    graph
}

fn is_root(file: &str) -> bool {
    matches!(file, "lib.rs" | "main.rs")
}

fn imports(files: &Files, file: &str) -> BTreeSet<String> {
    let module: Vec<&str> = if is_root(file) {
        Vec::new()
    } else {
        let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
        path.split('/').collect()
    };
    let resolve = |path: &String| {
        let segments: Vec<&str> = path.split("::").collect();
        let is_super = |segment: &&&str| **segment == "super";
        let supers = segments.iter().take_while(is_super).count();
        match segments[0] {
            "crate" => file_of(files, &[], &segments[1..]),
            "super" => file_of(files, &module[..module.len() - supers], &segments[supers..]),
            "self" => file_of(files, &module, &segments[1..]),
            // A child module; anything else is another crate, or a type in the same file.
            _ => file_of(files, &module, &segments),
        }
    };
    let lines = &files[file];
    let declared = modules(lines).map(|name| format!("self::{name}"));
    let paths = used_paths(lines).into_iter().chain(declared);
    let imports = paths.map(|path| resolve(&path));
    imports.filter(|import| import != file).collect()
}

/// The modules that a file declares.
fn modules(lines: &[String]) -> impl Iterator<Item = &str> {
    lines.iter().filter_map(|line| {
        without_visibility(line)
            .strip_prefix("mod ")?
            .strip_suffix(';')
    })
}

fn without_visibility(line: &str) -> &str {
    let visibilities = ["pub(crate) ", "pub(super) ", "pub "];
    visibilities
        .iter()
        .find_map(|visibility| line.strip_prefix(visibility))
        .unwrap_or(line)
}

/// The file of a module or an item, as far as the path leads through files.
fn file_of(files: &Files, module: &[&str], path: &[&str]) -> String {
    let root = files.keys().find(|file| is_root(file));
    let mut file = root.expect("a crate has a root").clone();
    let mut folder = String::new();
    for segment in module.iter().chain(path) {
        folder = format!("{folder}{segment}");
        let candidates = [format!("{folder}.rs"), format!("{folder}/mod.rs")];
        let Some(found) = candidates.into_iter().find(|it| files.contains_key(it)) else {
            break;
        };
        file = found;
        folder += "/";
    }
    file
}

/// The paths of all `use` declarations, and all other paths that begin with `crate::` or `super::`.
fn used_paths(lines: &[String]) -> Vec<String> {
    let mut paths = Vec::new();
    let mut lines = lines.iter();
    while let Some(line) = lines.next() {
        let start = without_visibility(line).strip_prefix("use ");
        // A line of a string literal may begin with "use ", too.
        if let Some(start) = start.filter(|start| start.contains("::") || start.ends_with(';')) {
            let mut declaration = start.to_owned();
            while !declaration.ends_with(';') {
                declaration += lines.next().expect("a declaration ends with a semicolon");
            }
            paths.extend(expand(declaration.trim_end_matches(';')));
        } else {
            let is_path = |char: char| char.is_alphanumeric() || "_:".contains(char);
            let words = line.split(|char| !is_path(char));
            paths.extend(
                words
                    .filter(|word| word.starts_with("crate::") || word.starts_with("super::"))
                    .map(str::to_owned),
            );
        }
    }
    paths
}

/// The paths of a `use` tree: `a::{b, c::{d, e}}` is `a::b`, `a::c::d` and `a::c::e`.
fn expand(tree: &str) -> Vec<String> {
    let Some((prefix, rest)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default().trim();
        return if path.is_empty() {
            Vec::new()
        } else {
            vec![path.to_owned()]
        };
    };
    let inner = rest
        .trim_end()
        .strip_suffix('}')
        .expect("braces are balanced");
    let mut depth = 0;
    let parts = inner.split(|char| {
        depth += i32::from(char == '{') - i32::from(char == '}');
        char == ',' && depth == 0
    });
    let prefix = prefix.trim();
    parts
        .flat_map(expand)
        .map(|path| format!("{prefix}{path}"))
        .collect()
}

/// A cycle, with its first file at both ends; empty if there is none.
fn find_cycle(graph: &BTreeMap<String, BTreeSet<String>>) -> Vec<&str> {
    let mut checked = BTreeSet::new();
    graph
        .keys()
        .find_map(|file| search(graph, file, &mut Vec::new(), &mut checked))
        .unwrap_or_default()
}

fn search<'a>(
    graph: &'a BTreeMap<String, BTreeSet<String>>,
    file: &'a str,
    path: &mut Vec<&'a str>,
    checked: &mut BTreeSet<&'a str>,
) -> Option<Vec<&'a str>> {
    if let Some(first) = path.iter().position(|earlier| *earlier == file) {
        return Some([&path[first..], &[file]].concat());
    }
    if !checked.insert(file) {
        return None;
    }
    path.push(file);
    let cycle = graph[file]
        .iter()
        .find_map(|import| search(graph, import, path, checked));
    path.pop();
    cycle
}

#[test]
fn an_import_cycle_is_found_through_nested_paths() {
    let cycle_with = |last: &str| {
        let files = [
            ("lib.rs", "mod a;\npub mod b;\nmod c;\npub use a::A;"),
            (
                "a.rs",
                "use std::{fmt, io};\nuse crate::{\n    b::{inner::{self, B}, C},\n};\nstruct A;",
            ),
            (
                "b/mod.rs",
                "//! As crate::a does.\nmod inner;\nuse crate::c::C;",
            ),
            ("b/inner.rs", last),
            ("c.rs", "struct C;\n#[cfg(test)]\nuse crate::a::A;"),
        ];
        let files = files
            .map(|(name, text)| (name.to_owned(), code(text)))
            .into();
        find_cycle(&imports_of_all(&files)).join(" -> ")
    };
    assert_eq!(cycle_with("use crate::c::C;"), "");
    let through_mod = "a.rs -> b/inner.rs -> b/mod.rs -> b/inner.rs";
    for (last, cycle) in [
        ("use crate::a;", "a.rs -> b/inner.rs -> a.rs"),
        ("fn f() { crate::a::f() }", "a.rs -> b/inner.rs -> a.rs"),
        (
            "pub(crate) use super::super::a::A as B;",
            "a.rs -> b/inner.rs -> a.rs",
        ),
        ("use super::C;", through_mod.trim_start_matches("a.rs -> ")),
        ("use crate::A;", "a.rs -> b/inner.rs -> lib.rs -> a.rs"),
    ] {
        assert_eq!(cycle_with(last), cycle, "{last}");
    }
}
