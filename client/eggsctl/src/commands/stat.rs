//! `stat`: everything about an inode: what a directory's policies are, how a file is stored.

use clap::Args;
use eggs_client::{DirectoryPolicies, Metadata, Span};
use eggs_proto::pb::Block;
use eggs_proto::{BlockServiceId, InodeType, Time};
use serde_json::{Value, json};

use super::ls::JsonLink;
use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::output::{JsonPath, hex, json_time, octal};
use crate::paths::{ClusterPath, escape};
use crate::policies;
use crate::policy_text;
use crate::spread::Disks;

/// Print everything about files and directories
///
/// Inode, type, modification time; for directories the parent and the policies that hold there; for
/// files the size, the CRCs and the spans with their blocks, each with the disk it is on. A span two of whose blocks share
/// a disk or a failure domain is marked "under-spread". A symbolic link is not followed.
#[derive(Debug, Args)]
pub struct Stat {
    #[command(flatten)]
    json: JsonFlag,
    /// Files and directories; with --json one is an object, several are an array
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

/// All there is to print.
#[derive(Debug)]
struct Found {
    path: ClusterPath,
    metadata: Metadata,
    more: More,
}

#[derive(Debug)]
enum More {
    Directory(Box<DirectoryPolicies>),
    File(Vec<Span>, Disks),
    Symlink(Vec<u8>),
}

impl Stat {
    pub async fn run(self, context: &Context) -> Outcome {
        let mut out = context.out();
        let mut operands = Operands::new(context.command);
        let mut documents = Vec::new();
        for (index, path) in self.paths.iter().enumerate() {
            match find(context, path).await {
                Ok(found) if self.json.json => documents.push(json(&found)),
                Ok(found) => {
                    if index > 0 {
                        out.bytes(b"\n")?;
                    }
                    out.line(text(&found))?;
                }
                Err(error) => {
                    out.flush()?;
                    operands.note(Err(error))?;
                }
            }
        }
        if self.json.json {
            match documents.as_slice() {
                [one] if self.paths.len() == 1 => out.json(one)?,
                [] if self.paths.len() == 1 => {}
                all => out.json(&all)?,
            }
        }
        out.finish()?;
        operands.finish()
    }
}

async fn find(context: &Context, path: &ClusterPath) -> Outcome<Found> {
    let client = context.client().await?;
    let on_path = |error| failure(path, error);
    let resolved = client.resolve_at(path.as_bytes(), Time::ZERO).await.map_err(on_path)?;
    let metadata = resolved.metadata;
    if path.means_directory() && !metadata.is_directory() {
        return Err(Failure::refused(path, "not a directory"));
    }
    let more = match metadata.kind {
        InodeType::Directory => More::Directory(Box::new(DirectoryPolicies {
            own: metadata.policies.clone().unwrap_or_default(),
            effective: eggs_proto::policy::inherit(resolved.policies, &eggs_proto::policy::defaults()),
        })),
        InodeType::File => {
            let spans = client.spans(resolved.inode).await.map_err(on_path)?;
            let in_blocks = spans.iter().any(|span| span.blocks.is_some());
            let disks = match in_blocks {
                true => Disks::of(client.cluster_map().await.map_err(on_path)?),
                false => Disks::default(),
            };
            More::File(spans, disks)
        }
        InodeType::Symlink => {
            More::Symlink(client.read_link_inode(resolved.inode).await.map_err(on_path)?.to_vec())
        }
    };
    Ok(Found { path: path.clone(), metadata, more })
}

/// The first four lines are those of the source document.
fn text(found: &Found) -> String {
    let metadata = &found.metadata;
    let mut lines = vec![
        format!("inode={}", metadata.inode),
        format!("type={}", metadata.kind.as_str()),
        format!("mtime={}", metadata.mtime.0),
    ];
    match (metadata.kind, metadata.parent) {
        (InodeType::Directory, Some(parent)) => lines.push(format!("parent={parent}")),
        (InodeType::Directory, None) => {}
        _ => lines.push(format!("size={}", metadata.size)),
    }
    lines.push(format!("mode={}", octal(metadata.mode)));
    lines.push(format!("uid={}", metadata.uid));
    lines.push(format!("gid={}", metadata.gid));
    lines.push(format!("created={}", metadata.created_at.0));
    if let Some(crc) = metadata.crc {
        lines.push(format!("crc={crc:#010x}"));
    }
    for (name, value) in &metadata.xattrs {
        lines.push(format!("xattr.{}={}", escape(name), escape(value)));
    }
    match &found.more {
        More::Directory(found) => {
            for (name, text, own) in policies::lines(found) {
                lines.push(format!("policy.{name}={text}{}", if own { "" } else { " (inherited)" }));
            }
        }
        More::File(spans, disks) => {
            lines.push(format!("spans={}", spans.len()));
            lines.extend(spans.iter().flat_map(|span| span_lines(span, disks)));
        }
        More::Symlink(target) => lines.push(format!("target={}", escape(target))),
    }
    lines.join("\n")
}

fn span_lines(span: &Span, disks: &Disks) -> Vec<String> {
    let mut first = format!(
        "span offset={} size={} crc={:#010x} class={}",
        span.offset,
        span.size,
        span.crc,
        policies::class_name(span.storage_class)
    );
    let Some(blocks) = &span.blocks else { return vec![first] };
    first += &format!(
        " layout={} stripes={} cell={}",
        policy_text::layout(blocks.data, blocks.parity),
        blocks.stripes,
        blocks.cell_size
    );
    if let Some(why) = disks.under_spread(blocks) {
        first += &format!(" under-spread ({why})");
    }
    let block = |(index, block): (usize, &eggs_proto::pb::Block)| {
        format!(
            "  block={index} id={:#018x} service={} crc={:#010x}{}",
            block.block,
            BlockServiceId(block.block_service),
            block.crc,
            disks.words(block.block_service)
        )
    };
    std::iter::once(first).chain(blocks.blocks.iter().enumerate().map(block)).collect()
}

fn json(found: &Found) -> Value {
    let metadata = &found.metadata;
    let JsonPath { path, path_hex } = JsonPath::of(found.path.as_bytes());
    let mut document = json!({
        "path": path,
        "inode": metadata.inode.to_string(),
        "type": metadata.kind.as_str(),
        "mtime_ns": metadata.mtime.0,
        "mtime": json_time(metadata.mtime),
        "created_at_ns": metadata.created_at.0,
        "created_at": json_time(metadata.created_at),
        "mode": octal(metadata.mode),
        "uid": metadata.uid,
        "gid": metadata.gid,
        "xattrs": metadata.xattrs.iter().map(|(name, value)| json!({
            "name_hex": hex(name),
            "value_hex": hex(value),
        })).collect::<Vec<_>>(),
    });
    if let Some(hex) = path_hex {
        document["path_hex"] = hex.into();
    }
    if let Some(crc) = metadata.crc {
        document["crc"] = format!("{crc:#010x}").into();
    }
    match &found.more {
        More::Directory(found) => {
            document["parent"] = metadata.parent.map(|parent| parent.to_string()).into();
            document["policies"] =
                json!({ "own": policies::json(&found.own), "effective": policies::json(&found.effective) });
        }
        More::File(spans, disks) => {
            document["size"] = metadata.size.into();
            document["spans"] = spans.iter().map(|span| json_span(span, disks)).collect();
        }
        More::Symlink(target) => {
            document["size"] = metadata.size.into();
            let JsonLink { target, target_hex } = JsonLink::of(target);
            document["target"] = target.into();
            if let Some(hex) = target_hex {
                document["target_hex"] = hex.into();
            }
        }
    }
    document
}

pub fn json_span(span: &Span, disks: &Disks) -> Value {
    let mut document = json!({
        "offset": span.offset,
        "size": span.size,
        "crc": format!("{:#010x}", span.crc),
        "storage_class": span.storage_class,
        "class": policies::class_name(span.storage_class),
    });
    if let Some(blocks) = &span.blocks {
        document["data"] = blocks.data.into();
        document["parity"] = blocks.parity.into();
        document["stripes"] = blocks.stripes.into();
        document["cell_size"] = blocks.cell_size.into();
        let why = disks.under_spread(blocks);
        document["under_spread"] = why.is_some().into();
        document["under_spread_why"] = why.into();
        let block = |block: &Block| {
            let mut document = json!({
                "id": format!("{:#018x}", block.block),
                "block_service": BlockServiceId(block.block_service).to_string(),
                "crc": format!("{:#010x}", block.crc),
            });
            disks.describe(block.block_service, &mut document);
            document
        };
        document["blocks"] = blocks.blocks.iter().map(block).collect();
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_client::Policies;
    use eggs_proto::pb::{BlockServiceInfo, Blocks, ClusterMapReply, StripePolicy};
    use eggs_proto::{InodeId, ShardId};

    fn found(kind: InodeType, more: More) -> Found {
        let file = kind != InodeType::Directory;
        Found {
            path: ClusterPath::parse(b"/x").unwrap(),
            metadata: Metadata {
                inode: InodeId::new(kind, ShardId(1), 3),
                kind,
                size: 22,
                created_at: Time(84_558_235_023_282_000),
                mtime: Time(84_558_235_023_282_121),
                atime: Time(1),
                mode: 0o644,
                uid: 1,
                gid: 2,
                crc: file.then_some(0xabc),
                parent: (!file).then_some(InodeId::ROOT),
                xattrs: Vec::new(),
                policies: None,
            },
            more,
        }
    }

    fn spans() -> Vec<Span> {
        let block = |n: u64| Block { block_service: n, block: n + 0x10, crc: 7, cell_crcs: vec![7] };
        vec![
            Span { offset: 0, size: 5, crc: 1, storage_class: 1, inline: "hello".into(), blocks: None },
            Span {
                offset: 5,
                size: 7,
                crc: 2,
                storage_class: 3,
                inline: Default::default(),
                blocks: Some(Blocks {
                    data: 1,
                    parity: 1,
                    stripes: 1,
                    cell_size: 4096,
                    blocks: vec![block(1), block(2)],
                }),
            },
            Span { offset: 12, size: 10, crc: 3, storage_class: 0, inline: Default::default(), blocks: None },
        ]
    }

    /// One of the two disks is known.
    fn disks() -> Disks {
        let disk = BlockServiceInfo {
            id: 1,
            failure_domain: "rack".into(),
            address: "h:1".into(),
            path: "/d".into(),
            flags: 2,
            ..BlockServiceInfo::default()
        };
        Disks::of(ClusterMapReply { block_services: vec![disk], ..ClusterMapReply::default() })
    }

    #[test]
    fn golden_file() {
        assert_eq!(
            text(&found(InodeType::File, More::File(spans(), disks()))),
            "inode=0x2020000000000003\n\
             type=FILE\n\
             mtime=84558235023282121\n\
             size=22\n\
             mode=0644\n\
             uid=1\n\
             gid=2\n\
             created=84558235023282000\n\
             crc=0x00000abc\n\
             spans=3\n\
             span offset=0 size=5 crc=0x00000001 class=INLINE\n\
             span offset=5 size=7 crc=0x00000002 class=FLASH layout=mirror2 stripes=1 cell=4096\n  \
               block=0 id=0x0000000000000011 service=0x0000000000000001 crc=0x00000007 domain=rack address=h:1 path=/d flags=NO_WRITE\n  \
               block=1 id=0x0000000000000012 service=0x0000000000000002 crc=0x00000007 (not in the cluster)\n\
             span offset=12 size=10 crc=0x00000003 class=EMPTY"
        );
    }

    #[test]
    fn golden_directory() {
        let own = Policies { stripe: Some(StripePolicy { cell_size: 8192 }), ..Policies::default() };
        let effective = eggs_proto::policy::inherit(own.clone(), &eggs_proto::policy::defaults());
        let more = More::Directory(Box::new(DirectoryPolicies { own, effective }));
        assert_eq!(
            text(&found(InodeType::Directory, more)),
            "inode=0x0020000000000003\n\
             type=DIRECTORY\n\
             mtime=84558235023282121\n\
             parent=0x0020000000000000\n\
             mode=0644\n\
             uid=1\n\
             gid=2\n\
             created=84558235023282000\n\
             policy.snapshot=all (inherited)\n\
             policy.span=4K:inline,64K:mirror3,64M:4+2 (inherited)\n\
             policy.block=FLASH (inherited)\n\
             policy.stripe=8K"
        );
    }

    #[test]
    fn golden_json() {
        let document = json(&found(InodeType::File, More::File(spans()[1..2].to_vec(), disks())));
        let expected = json!({
            "path": "/x",
            "inode": "0x2020000000000003",
            "type": "FILE",
            "mtime_ns": 84_558_235_023_282_121_u64,
            "mtime": "1972-09-05T16:23:55.023282121Z",
            "created_at_ns": 84_558_235_023_282_000_u64,
            "created_at": "1972-09-05T16:23:55.023282000Z",
            "mode": "0644",
            "uid": 1,
            "gid": 2,
            "xattrs": [],
            "crc": "0x00000abc",
            "size": 22,
            "spans": [{
                "offset": 5,
                "size": 7,
                "crc": "0x00000002",
                "storage_class": 3,
                "class": "FLASH",
                "data": 1,
                "parity": 1,
                "stripes": 1,
                "cell_size": 4096,
                "under_spread": false,
                "under_spread_why": null,
                "blocks": [
                    {
                        "id": "0x0000000000000011",
                        "block_service": "0x0000000000000001",
                        "crc": "0x00000007",
                        "address": "h:1",
                        "failure_domain": "rack",
                        "path": "/d",
                        "flags": ["NO_WRITE"],
                    },
                    {
                        "id": "0x0000000000000012",
                        "block_service": "0x0000000000000002",
                        "crc": "0x00000007",
                        "address": null,
                        "failure_domain": null,
                        "path": null,
                        "flags": null,
                    },
                ],
            }],
        });
        assert_eq!(document, expected);
        let link = json(&found(InodeType::Symlink, More::Symlink(b"t\xff".to_vec())));
        assert_eq!(link["target_hex"], "74ff");
        assert_eq!(link["type"], "SYMLINK");
    }
}
