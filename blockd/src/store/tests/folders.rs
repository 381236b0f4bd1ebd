//! Folders that are disks, or are not, or not any more.

use super::*;

#[test]
fn only_empty_folders_are_formatted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b");
    assert_eq!(inspect(&path).unwrap(), Contents::Absent);
    fs::create_dir_all(path.join("lost+found")).unwrap();
    // As an interrupted formatting leaves it.
    fs::create_dir(path.join("segments")).unwrap();
    fs::write(path.join("identity.new"), b"half").unwrap();
    assert_eq!(inspect(&path).unwrap(), Contents::Empty);
    assert!(matches!(problem(&path), OpenProblem::NotFormatted));
    format(&path, &identity()).unwrap();
    assert_eq!(inspect(&path).unwrap(), Contents::Disk(identity()));

    // A disk is not formatted again, nor is a folder with anything in it.
    assert!(matches!(format(&path, &identity()).unwrap_err().problem, OpenProblem::NotEmpty));
    for file in ["mine.txt", "segments/x", "journal"] {
        let other = folder.path().join("other");
        fs::create_dir_all(other.join("segments")).unwrap();
        fs::write(other.join(file), b"precious").unwrap();
        assert!(matches!(inspect(&other).unwrap_err().problem, OpenProblem::NotEmpty));
        assert!(matches!(format(&other, &identity()).unwrap_err().problem, OpenProblem::NotEmpty));
        assert!(!other.join("identity").exists());
        fs::remove_dir_all(other).unwrap();
    }
}

#[test]
fn what_is_not_our_disk_is_refused_untouched() {
    let (folder, store) = disk();
    assert!(matches!(problem(folder.path()), OpenProblem::InUse));
    drop(store);

    let other = Store::open(folder.path(), ClusterId([2; 16]), Options::default()).unwrap_err();
    assert!(matches!(other.problem, OpenProblem::AnotherCluster { theirs: CLUSTER, .. }), "{other}");

    let file = folder.path().join("identity");
    let good = fs::read(&file).unwrap();
    let mut newer = good.clone();
    newer[8] = 4;
    fs::write(&file, &newer).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Newer { found: 4 })));
    // As it was with a file per block.
    newer[8] = 2;
    fs::write(&file, &newer).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Older { found: 2 })));
    fs::write(&file, &good[..50]).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Damaged(_))));
    fs::write(&file, vec![b'x'; 1 << 20]).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Damaged(_))));
    fs::write(&file, &good).unwrap();

    fs::remove_dir(folder.path().join("segments")).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Incomplete("segments")));
    assert!(!folder.path().join("segments").exists());
    fs::remove_file(&file).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::NotFormatted));
    assert!(matches!(problem(&folder.path().join("nothing")), OpenProblem::Missing));
}

#[test]
fn a_disk_that_vanishes_is_noticed_and_not_made_again() {
    let damages: [fn(&Path); 5] = [
        |path| fs::remove_dir_all(path).unwrap(),
        |path| fs::remove_file(path.join("identity")).unwrap(),
        |path| fs::write(path.join("identity"), b"something else").unwrap(),
        |path| fs::rename(path.join("segments"), path.join("kept")).unwrap(),
        |path| {
            fs::rename(path, path.with_extension("old")).unwrap();
            format(path, &identity()).unwrap();
        },
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        format(&path, &identity()).unwrap();
        let store = open(&path);
        let (id, bytes) = (block(1), contents(1, 5000));
        store.check().unwrap();
        let arriving = begin(&store, block(3), &bytes);
        damage(&path);
        store.check().unwrap_err();
        assert_eq!(code(store.read(id)), Some(BlockError::DiskLost), "damage {n}");
        drop(arriving);
        if n == 0 {
            assert_eq!(code(write(&store, id, &bytes)), Some(BlockError::DiskLost));
            assert_eq!(code(store.erase(id)), Some(BlockError::DiskLost));
            assert!(!path.exists());
        }
    }
}
