//! Walking a path as far as this host leads its shards: one look-up per component.

use eggs_machine::{Table, TableError};
use eggs_proto::limits::WALK_COMPONENTS_MAX;
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, Time, pb, policy};

use crate::context::check_name;
use crate::edges::{Seen, quoted, resolve};
use crate::{read, schema};

/// Resolves the components; `views` gives the state of the shards led here.
///
/// The walk ends at the first inode whose shard is not led here; the caller goes on there.
/// Policies are the ones of now, also when the walk looks at the past.
///
/// # Errors
/// The inner error refuses the request; the outer says that the state cannot be read.
pub fn walk<'a, T: Table + ?Sized + 'a>(
    views: impl Fn(ShardId) -> Option<&'a T>,
    walk: &pb::Walk,
    _now: Time,
) -> Result<Result<pb::WalkReply, pb::Error>, TableError> {
    let start = InodeId(walk.start);
    if start.is_null() || start.kind().is_none() || walk.components.len() > WALK_COMPONENTS_MAX {
        return Ok(Err(ShardError::Malformed
            .with(format_args!("walk of {} components from {start}", walk.components.len()))));
    }
    let Some(mut view) = views(start.shard()) else {
        return Ok(Err(ShardError::NotLeader.with(format_args!("shard {}", start.shard()))));
    };
    let mut reply = pb::WalkReply { inode: start.0, ..Default::default() };
    let mut policies = pb::Policies::default();
    let mut directory = enter(view, start, &mut policies)?;
    let mut led = true;
    for name in &walk.components {
        let here = InodeId(reply.inode);
        let stopped = match next(view, here, directory.is_some(), name, walk)? {
            Ok(Seen { locked_by, .. }) if locked_by != 0 => {
                reply.locked_by = locked_by;
                break;
            }
            Ok(Seen { target, created_at, .. }) => {
                reply.consumed += 1;
                reply.inode = target.0;
                reply.directory = here.0;
                reply.created_at = created_at;
                let Some(next) = views(target.shard()) else {
                    led = false;
                    break;
                };
                view = next;
                directory = enter(view, target, &mut policies)?;
                continue;
            }
            Err(error) => error,
        };
        reply.stopped = Some(stopped);
        break;
    }
    if led {
        describe(view, walk, directory, &mut reply)?;
    }
    reply.policies = Some(policies);
    Ok(Ok(reply))
}

/// Reads a directory that the walk comes to and takes in its policies.
fn enter<T: Table + ?Sized>(
    view: &T,
    inode: InodeId,
    policies: &mut pb::Policies,
) -> Result<Option<pb::DirectoryRow>, TableError> {
    if !inode.is_directory() {
        return Ok(None);
    }
    let row: Option<pb::DirectoryRow> = schema::get(view, &schema::directory_key(inode))?;
    if let Some(nearer) = row.as_ref().and_then(|row| row.policies.clone()) {
        *policies = policy::inherit(nearer, policies);
    }
    Ok(row)
}

/// The edge under `name`, locked only by moves the asker knows nothing of; or why there is no way.
fn next<T: Table + ?Sized>(
    view: &T,
    here: InodeId,
    exists: bool,
    name: &[u8],
    walk: &pb::Walk,
) -> Result<Result<Seen, pb::Error>, TableError> {
    if !here.is_directory() {
        return Ok(Err(ShardError::NotDirectory.with(format_args!("inode {here}"))));
    }
    if let Err(error) = check_name(name) {
        return Ok(Err(error));
    }
    let mut edge = if exists { resolve(view, here, name, Time(walk.at))? } else { None };
    if let Some(seen) = &mut edge
        && seen.locked_by != 0
    {
        if walk.not_moved.contains(&seen.locked_by) {
            seen.locked_by = 0;
        } else if let Some(known) = walk.exchanged.iter().find(|known| known.transaction == seen.locked_by) {
            let target = InodeId(known.target);
            if target.is_null() || target.kind().is_none() {
                return Ok(Err(ShardError::Malformed.with(format_args!("exchanged with {target}"))));
            }
            *seen = Seen { target, created_at: known.exchanged_at, locked_by: 0 };
        }
    }
    let edge = edge.filter(|seen| seen.locked_by == 0 || !walk.moved.contains(&seen.locked_by));
    Ok(edge.ok_or_else(|| ShardError::NotFound.with(quoted(name))))
}

/// Attributes and spans of the inode where the walk ended.
fn describe<T: Table + ?Sized>(
    view: &T,
    walk: &pb::Walk,
    directory: Option<pb::DirectoryRow>,
    reply: &mut pb::WalkReply,
) -> Result<(), TableError> {
    let inode = InodeId(reply.inode);
    if let Some(row) = directory {
        if walk.want_attributes {
            reply.attributes = Some(read::of_directory(inode, row));
        }
        return Ok(());
    }
    if inode.is_directory() || !(walk.want_attributes || walk.want_spans) {
        return Ok(());
    }
    let attributes = read::attributes(view, inode)?;
    if walk.want_spans
        && let Some(attributes) = &attributes
    {
        let (spans, more) = read::first_spans(view, attributes)?;
        reply.spans = spans;
        reply.all_spans = !more;
    }
    if walk.want_attributes {
        reply.attributes = attributes;
    }
    Ok(())
}
